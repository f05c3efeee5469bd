-- Adds to the copy of a stream, or only lets it live on.
--
-- KEYS: the copy, and where those who read it are. ARGV: how long it lives, in milliseconds; the channel; the news; 1 where
-- the copy begins anew; 1 where readers may lose their place; how many fields are taken out, and those, in their order;
-- then fields and their values.
-- Answers 1; 0 where the copy is not there any more; 2 where nothing was done, because a reader still needs what would be
-- taken out. And where its readers are: a number, or nothing where there are none.
local copy, lives, channel, news = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local readers, gone = redis.call('GET', KEYS[2]), tonumber(ARGV[6])
if ARGV[4] == '1' then
  redis.call('DEL', copy)
elseif redis.call('EXISTS', copy) == 0 then
  return { 0, '' }
elseif readers and gone > 0 and ARGV[5] ~= '1' and tonumber(ARGV[6 + gone]) >= tonumber(readers) then
  redis.call('PEXPIRE', copy, lives)
  return { 2, readers }
end
local next = 7
for _ = 1, gone do
  redis.call('HDEL', copy, ARGV[next])
  next = next + 1
end
local grows = next < #ARGV
while next < #ARGV do
  redis.call('HSET', copy, ARGV[next], ARGV[next + 1])
  next = next + 2
end
redis.call('PEXPIRE', copy, lives)
if readers and grows then
  -- Whether or not the user may use the channel: they look by themselves, too.
  redis.pcall('PUBLISH', channel, news)
end
return { 1, readers or '' }
