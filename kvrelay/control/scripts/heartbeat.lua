-- Renews a lease, and with it all that a wiped Redis has forgotten of the member.
-- ARGV: member, lease, lease time in ms, epoch. Replies 1, or 0 if a later epoch of the member has begun.
local member, lease, lease_ms, epoch = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
if known_epoch(member) > epoch then return 0 end
heal_members()
remember_epoch(member, epoch)
redis.call('SET', lease_key(member), lease, 'PX', lease_ms)
redis.call('SADD', MEMBERS, member)
return 1
