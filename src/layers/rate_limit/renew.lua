-- Renews leases of what is in flight. KEYS: the counter. ARGV: per in microseconds, 1 for those too that Redis has lost,
-- then the leases.

local time = redis.call('TIME')
local expires = string.format('%.0f', time[1] * 1000000 + time[2] + tonumber(ARGV[1]))
for i = 3, #ARGV do
  if ARGV[2] == '1' then
    redis.call('ZADD', KEYS[1], expires, ARGV[i])
  else
    redis.call('ZADD', KEYS[1], 'XX', expires, ARGV[i])
  end
end
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil(tonumber(ARGV[1]) / 1000) + 1))
return #ARGV - 2
