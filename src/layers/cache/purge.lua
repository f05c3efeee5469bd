-- Marks names as purged, in one step, and then tells all replicas.
--
-- KEYS: the mark of patterns, their list, and the marks of names.
-- ARGV: how long marks live, in milliseconds; how many patterns are remembered; the end of their list; the channel; the
-- message; the number of patterns, of each its number and its line; of each mark its number and whether it is a soft one.
local lives, most, none, channel, message = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local next = 7
for _ = 1, tonumber(ARGV[6]) do
  if redis.call('EXISTS', KEYS[2]) == 0 then
    redis.call('RPUSH', KEYS[2], none)
  end
  redis.call('LPUSH', KEYS[2], ARGV[next + 1])
  redis.call('LTRIM', KEYS[2], 0, most)
  redis.call('PEXPIRE', KEYS[2], lives)
  redis.call('SET', KEYS[1], ARGV[next], 'PX', lives)
  next = next + 2
end
for at = 3, #KEYS do
  local number, hard = ARGV[next], ''
  if ARGV[next + 1] == '1' then
    -- What was purged for good before stays so.
    hard = string.match(redis.call('GET', KEYS[at]) or '', '^[^:]*')
    redis.call('SET', KEYS[at], hard .. ':' .. number, 'PX', lives)
  else
    redis.call('SET', KEYS[at], number .. ':', 'PX', lives)
  end
  next = next + 2
end
-- Whether or not the user may use the channel, the marks hold.
local told = redis.pcall('PUBLISH', channel, message)
return type(told) == 'number' and told or -1
