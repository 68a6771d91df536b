-- Admits a request, unless its id is known or the waiting room is full.
-- ARGV: gateway, id, digest, rank, most running, most waiting, start.
-- Replies {quarantined keys, verdict, ...}: "unknown_gateway", "conflict", "running", "waiting",
-- "existing", state, gateway, outcome; or "full", now, times of the last finishes.
local gateway, id, digest, rank = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local max_running, max_waiting, start = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]

-- Whether somebody may still hold a finished request's responses, which die with the gateway's start.
local function may_be_replayed(record)
  if record.outcome == 'failed' or record.outcome == 'withdrawn' then return false end
  if record.gateway == gateway then return record.start == start end
  return is_known(record.gateway)
end

heal_queue(gateway)
if not is_known(gateway) then return { quarantined, 'unknown_gateway' } end

local record = read(id)
if record then
  if record.digest ~= digest then return { quarantined, 'conflict' } end
  if record.state ~= 'finished' then
    -- The gateway asks only about ids that it does not hold, so this is its own call whose reply got lost.
    if record.gateway == gateway then
      hold(id, record, record.state)
      return { quarantined, record.state }
    end
    return { quarantined, 'existing', record.state, record.gateway, record.outcome }
  end
  if may_be_replayed(record) then
    return { quarantined, 'existing', record.state, record.gateway, record.outcome }
  end
end

local num_waiting = redis.call('ZCARD', WAITING)
local state = 'waiting'
if num_waiting == 0 and redis.call('ZCARD', RUNNING) < max_running then
  state = 'running'
elseif num_waiting >= max_waiting then
  return { quarantined, 'full', now, redis.call('LRANGE', FINISHES, 0, -1) }
end
hold(id, { digest = digest, gateway = gateway, rank = rank }, state)
return { quarantined, state }
