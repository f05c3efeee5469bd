-- What is at some names, and what time it is, in milliseconds.
--
-- KEYS: a name to write to; those that are asked for. ARGV: how long it lives then, in milliseconds, or 0 not to write.
if ARGV[1] ~= '0' then
  -- Fails where there is no room, as marks do.
  redis.call('SET', KEYS[1], '', 'PX', ARGV[1])
end
local found = redis.call('MGET', unpack(KEYS, 2))
local time = redis.call('TIME')
return { time[1] * 1000 + math.floor(time[2] / 1000), found }
