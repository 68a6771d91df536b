-- Ends a request, waiting or running, and gives its slot to those who wait.
-- ARGV: gateway, id, digest, rank, outcome, how long to remember it in ms, most running, start.
-- Replies {quarantined keys, promoted ids of this gateway}.
local gateway, id, max_running = ARGV[1], ARGV[2], tonumber(ARGV[7])

heal_queue(gateway)
local record = read(id) or { state = 'forgotten', digest = ARGV[3], gateway = gateway, rank = ARGV[4] }
if record.gateway == gateway then
  if release(id, record) then
    redis.call('LPUSH', FINISHES, now)
    redis.call('LTRIM', FINISHES, 0, FINISHES_KEPT - 1)
  end
  record.state, record.outcome, record.start = 'finished', ARGV[5], ARGV[8]
  write(id, record, ARGV[6])
end
local promoted = {}
promote(gateway, max_running, promoted)
return { quarantined, promoted }
