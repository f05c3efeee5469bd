-- Renews leases of what is in flight, those too that a Redis has lost. KEYS: the counter. ARGV: per in microseconds,
-- then the leases.

local time = redis.call('TIME')
local expires = string.format('%.0f', time[1] * 1000000 + time[2] + tonumber(ARGV[1]))
for i = 2, #ARGV do
  redis.call('ZADD', KEYS[1], expires, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil(tonumber(ARGV[1]) / 1000) + 1))
return #ARGV - 1
