-- Gives back to limits what was taken and not used, or charges what was used beyond it: `Quota::settle` of window.rs.
--
-- KEYS: the counters. ARGV, six for each: the algorithm as in script.lua, the change, when it was taken, limit and per
-- in microseconds, the lease.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

for i, key in ipairs(KEYS) do
  local a = (i - 1) * 6
  local algorithm, change, taken = ARGV[a + 1], tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  local limit, per = tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5])
  if algorithm == '0' then
    local this, before, used = math.floor(now / per), 0, 0
    local index, b, u = string.match(redis.call('GET', key) or '', '^(%d+) (%d+) (%d+)$')
    index = tonumber(index)
    if index and index >= this then
      this = math.min(index, this + 1)
      before, used = tonumber(b), tonumber(u)
    elseif index == this - 1 then
      before = tonumber(u)
    end
    local of = math.floor(taken / per)
    if change >= 0 or of >= this then
      used = math.max(0, used + change)
    elseif of == this - 1 then
      before = math.max(0, before + change)
    end
    local lives = (this + 2) * per - now
    local value = string.format('%.0f %.0f %.0f', this, before, used)
    redis.call('SET', key, value, 'PX', string.format('%.0f', math.ceil(lives / 1000) + 1))
  elseif algorithm == '1' then
    local level = 0
    local at, old = string.match(redis.call('GET', key) or '', '^(%d+) (%S+)$')
    if at then level = math.max(0, tonumber(old) - math.max(0, now - tonumber(at)) * limit / per) end
    level = math.max(0, level + change)
    local lives = level * per / limit
    redis.call('SET', key, string.format('%.0f %.17g', now, level), 'PX', string.format('%.0f', math.ceil(lives / 1000) + 1))
  else
    redis.call('ZREM', key, ARGV[a + 6])
  end
end
return #KEYS
