-- All leases. Members whose lease ended are forgotten, what cannot be a lease is put aside.
-- ARGV: bytes that a lease may have. Replies {member, lease, member, lease, ...}.
local longest = tonumber(ARGV[1])
heal_members()
local found = {}
for _, member in ipairs(redis.call('SMEMBERS', MEMBERS)) do
  local key = lease_key(member)
  local length = redis.pcall('STRLEN', key)
  if type(length) ~= 'number' or length > longest then
    quarantine(key, member)
  elseif length == 0 then
    redis.pcall('SREM', MEMBERS, member) -- pcall: a Redis that takes no writes can still be read
  else
    found[#found + 1] = member
    found[#found + 1] = redis.call('GET', key)
  end
end
return found
