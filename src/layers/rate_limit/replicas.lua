-- Says that a replica lives, and counts those that do. KEYS: their set. ARGV: the replica, how long that holds in
-- microseconds; 0 says that it ends.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local lasts = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if lasts > 0 then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + lasts), ARGV[1])
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil(lasts / 1000) + 1))
else
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return redis.call('ZCARD', KEYS[1])
