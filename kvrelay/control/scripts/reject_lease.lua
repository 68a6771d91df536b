-- Puts a lease aside that a reader refused, unless it has been replaced meanwhile.
-- ARGV: member, the refused lease.
local member, refused = ARGV[1], ARGV[2]
if redis.pcall('GET', lease_key(member)) == refused then quarantine(lease_key(member), member) end
return 0
