-- Writes requests again that a wiped Redis has forgotten. They were admitted once, so no bound applies.
-- ARGV: gateway, most running, whether this is the last part (1 or 0), JSON [[id, digest, rank, state], ...].
-- Replies {quarantined keys, promoted ids of this gateway}.
local gateway, max_running = ARGV[1], tonumber(ARGV[2])

heal_queue(gateway)
redis.call('ZADD', GATEWAYS, now, gateway)
for _, entry in ipairs(cjson.decode(ARGV[4])) do
  local id, digest, rank, state = unpack(entry)
  if not read(id) then hold(id, { digest = digest, gateway = gateway, rank = rank }, state) end
end
local promoted = {}
if ARGV[3] == '1' then promote(gateway, max_running, promoted) end
return { quarantined, promoted }
