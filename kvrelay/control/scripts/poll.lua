-- Makes Redis agree with what a gateway holds, and shows that the gateway lives.
-- ARGV: gateway, most running, a gateway's lease in ms, grace in ms, window, ids that wait (JSON), ids that run (JSON).
-- Replies {quarantined keys, promoted ids, ids that Redis has forgotten}.
local gateway, max_running = ARGV[1], tonumber(ARGV[2])
local lease_ms, grace_ms, window = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local waiting, running = cjson.decode(ARGV[6]), cjson.decode(ARGV[7])
local MOST_DEAD_GATEWAYS, MOST_DROPPED = 4, 256 -- in one call, the latter of each gateway
local WINDOW_SIZE = 16

-- Requests of gateways that are silent for a lease.
local function drop_dead_gateways()
  local dead = redis.call('ZRANGEBYSCORE', GATEWAYS, '-inf', now - lease_ms, 'LIMIT', 0, MOST_DEAD_GATEWAYS)
  for _, other in ipairs(dead) do
    heal(owned_key(other), 'set')
    for _, id in ipairs(redis.call('SPOP', owned_key(other), MOST_DROPPED)) do
      local record = read(id)
      if record and record.gateway == other and record.state ~= 'finished' then drop(id, record) end
    end
    if redis.call('SCARD', owned_key(other)) == 0 then redis.call('ZREM', GATEWAYS, other) end
  end
end

-- Entries of an index that lead to no living request; looks at a few in each call, and at all in turn.
local function sweep(index, state, id_in)
  local size = redis.call('ZCARD', index)
  if size == 0 then return end
  local first = (window * WINDOW_SIZE) % (math.ceil(size / WINDOW_SIZE) * WINDOW_SIZE)
  for _, entry in ipairs(redis.call('ZRANGE', index, first, first + WINDOW_SIZE - 1)) do
    local id = id_in(entry)
    local record = id and read(id)
    local stands = record and record.state == state and is_known(record.gateway)
    if not stands or (state == 'waiting' and waiting_member(record.rank, id) ~= entry) then
      redis.call('ZREM', index, entry)
      if record and record.state == state and not is_known(record.gateway) then drop(id, record) end
    end
  end
end

heal_queue(gateway)
redis.call('ZADD', GATEWAYS, now, gateway)
drop_dead_gateways()
sweep(RUNNING, 'running', function(entry) return entry end)
sweep(WAITING, 'waiting', id_of)

local owned = {}
for _, id in ipairs(redis.call('SMEMBERS', owned_key(gateway))) do owned[id] = true end
local listed, promoted, forgotten = {}, {}, {}

-- An index entry may have been lost with a key that was put aside.
local function is_indexed(id, record)
  if not owned[id] then return false end
  if record.state == 'running' then return redis.call('ZSCORE', RUNNING, id) end
  return redis.call('ZSCORE', WAITING, waiting_member(record.rank, id))
end

for _, id in ipairs(running) do
  listed[id] = true
  local record = read(id)
  if not record then
    forgotten[#forgotten + 1] = id
  elseif record.gateway == gateway and record.state ~= 'finished' then
    if record.state ~= 'running' or not is_indexed(id, record) then hold(id, record, 'running') end
  end
end
for _, id in ipairs(waiting) do
  listed[id] = true
  local record = read(id)
  if not record then
    forgotten[#forgotten + 1] = id
  elseif record.gateway == gateway and record.state ~= 'finished' then
    if not is_indexed(id, record) then hold(id, record, record.state) end
    if record.state == 'running' then promoted[#promoted + 1] = id end
  end
end

-- What this gateway does not hold: the reply to its entry was lost. Young entries may be on their way.
for id in pairs(owned) do
  local record = not listed[id] and read(id)
  if not listed[id] and (not record or record.gateway ~= gateway or record.state == 'finished') then
    redis.call('SREM', owned_key(gateway), id)
  elseif record and now - record.since >= grace_ms then
    drop(id, record)
  end
end

-- While something is forgotten the free slots are not free; `restore` promotes then.
if #forgotten == 0 then promote(gateway, max_running, promoted) end
return { quarantined, promoted, forgotten }
