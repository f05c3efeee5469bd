-- Reads on in the copy of a stream, and says that somebody does.
--
-- KEYS: the copy, and where those who read it are. ARGV: the next byte; what a value is longer than its bytes; how many
-- bytes at most, or one value; how long it is believed that somebody reads, in milliseconds; the channel; the question.
-- Answers how many bytes the copy reaches, nothing where it is not there; its end, or nothing; and the values.
local copy, at, more, most = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local known = redis.call('HMGET', copy, 'to', 'end')
if not known[1] then
  return { '' }
end
local answer = { known[1], known[2] or '' }
while most > 0 do
  local value = redis.call('HGET', copy, string.format('%.0f', at))
  if not value or #value <= more then
    break
  end
  answer[#answer + 1] = value
  at, most = at + #value - more, most - #value
end
if not known[2] then
  redis.call('SET', KEYS[2], string.format('%.0f', at), 'PX', ARGV[4])
  if #answer == 2 then
    redis.pcall('PUBLISH', ARGV[5], ARGV[6])
  end
end
return answer
