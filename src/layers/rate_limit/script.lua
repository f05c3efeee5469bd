-- Asks several limits in one step: see window.rs, of which this is the same in Lua.
--
-- KEYS: the counters. ARGV, six for each: the algorithm (0 sliding window, 1 token bucket, 2 in flight), cost, limit,
-- per in microseconds, burst, 1 for a shadow. ARGV after those: for each its lease, how many leases have ended, and those.
-- Answers {passes, now, then for each: fits, remaining, reset and wait in microseconds (-1: unknown)}.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local rules, passes = {}, 1
local next = #KEYS * 6 + 1

for i, key in ipairs(KEYS) do
  local a = (i - 1) * 6
  local rule = {
    key = key, algorithm = ARGV[a + 1], cost = tonumber(ARGV[a + 2]), limit = tonumber(ARGV[a + 3]),
    per = tonumber(ARGV[a + 4]), burst = tonumber(ARGV[a + 5]), lease = ARGV[next], wait = -1,
  }
  local ended = tonumber(ARGV[next + 1])
  for n = next + 2, next + 1 + ended do redis.call('ZREM', key, ARGV[n]) end
  next = next + 2 + ended
  if rule.algorithm == '0' then
    rule.most, rule.index = rule.limit, math.floor(now / rule.per)
    rule.before, rule.taken = 0, 0
    local index, before, taken = string.match(redis.call('GET', key) or '', '^(%d+) (%d+) (%d+)$')
    index = tonumber(index)
    if index and index >= rule.index then
      -- The clock may have gone back.
      rule.index = math.min(index, rule.index + 1)
      rule.before, rule.taken = tonumber(before), tonumber(taken)
    elseif index == rule.index - 1 then
      rule.before = tonumber(taken)
    end
    local elapsed = now - rule.index * rule.per
    rule.used = rule.before * (rule.per - math.max(0, elapsed)) / rule.per + rule.taken
    rule.reset = rule.per - elapsed
    rule.fits = rule.used + rule.cost <= rule.most
    if not rule.fits then
      local room = rule.limit - rule.taken - rule.cost
      if room >= 0 then
        rule.wait = rule.per * (1 - room / rule.before) - elapsed
      else
        local reach = 0
        if rule.taken > 0 then reach = math.max(0, 1 - (rule.limit - rule.cost) / rule.taken) end
        rule.wait = rule.per - elapsed + rule.per * reach
      end
    end
  elseif rule.algorithm == '1' then
    rule.most, rule.used = rule.burst, 0
    local at, level = string.match(redis.call('GET', key) or '', '^(%d+) (%S+)$')
    if at then
      local sunk = math.max(0, now - tonumber(at)) * rule.limit / rule.per
      rule.used = math.max(0, tonumber(level) - sunk)
    end
    rule.reset = rule.used * rule.per / rule.limit
    rule.fits = rule.used + rule.cost <= rule.most
    if not rule.fits then rule.wait = (rule.used + rule.cost - rule.burst) * rule.per / rule.limit end
  else
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    rule.most, rule.used, rule.reset = rule.limit, redis.call('ZCARD', key), 0
    rule.fits = rule.used + rule.cost <= rule.most
  end
  if not rule.fits and ARGV[a + 6] == '0' then passes = 0 end
  rules[i] = rule
end

local answer = {passes, now}
for _, rule in ipairs(rules) do
  local left = rule.most - rule.used
  if passes == 1 and rule.fits and rule.cost > 0 then
    left = left - rule.cost
    if rule.algorithm == '0' then
      local value = string.format('%.0f %.0f %.0f', rule.index, rule.before, rule.taken + rule.cost)
      local lives = (rule.index + 2) * rule.per - now
      redis.call('SET', rule.key, value, 'PX', string.format('%.0f', math.ceil(lives / 1000) + 1))
    elseif rule.algorithm == '1' then
      local level = rule.used + rule.cost
      rule.reset = level * rule.per / rule.limit
      local lives = rule.reset
      redis.call('SET', rule.key, string.format('%.0f %.17g', now, level), 'PX', string.format('%.0f', math.ceil(lives / 1000) + 1))
    else
      redis.call('ZADD', rule.key, string.format('%.0f', now + rule.per), rule.lease)
      redis.call('PEXPIRE', rule.key, string.format('%.0f', math.ceil(rule.per / 1000) + 1))
    end
  end
  if not rule.fits and rule.algorithm ~= '2' then rule.wait = math.ceil(math.max(0, rule.wait)) + 1 end
  answer[#answer + 1] = rule.fits and 1 or 0
  answer[#answer + 1] = math.floor(math.max(0, left))
  answer[#answer + 1] = math.floor(math.max(0, rule.reset))
  answer[#answer + 1] = rule.wait
end
return answer
