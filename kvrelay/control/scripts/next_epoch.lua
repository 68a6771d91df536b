-- A new epoch for a member: higher than all before it, also when Redis was wiped in between, for it is at least the
-- number of milliseconds since 2020.
-- ARGV: member. Replies the epoch.
local START_OF_2020 = 1577836800
local time = redis.call('TIME')
local milliseconds = (tonumber(time[1]) - START_OF_2020) * 1000 + math.floor(tonumber(time[2]) / 1000)
local epoch = math.max(known_epoch(ARGV[1]) + 1, milliseconds)
remember_epoch(ARGV[1], epoch)
return epoch
