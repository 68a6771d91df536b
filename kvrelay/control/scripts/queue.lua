-- What the scripts of the queue share. Redis runs a script as one step: nothing happens in between.
--
-- kvrelay:request:ID           hash: one request, see `read`; expires
-- kvrelay:queue:waiting        zset: RANK/ID, all of score 0 and so ordered by rank; a fair share may become the score
-- kvrelay:queue:running        zset: ID, by the time it got its slot
-- kvrelay:queue:gateways       zset: gateway, by the time it showed itself last
-- kvrelay:queue:owned:GATEWAY  set: ids of its waiting and running requests
-- kvrelay:queue:finishes       list: when the last requests gave their slots back, newest first
-- kvrelay:quarantine:KEY       what was found in the place of one of these and is none; expires
--
-- Times are milliseconds of Unix time on Redis's clock. A request record is the truth; the sets are indexes into the
-- records, and an index entry without its record is dropped wherever it is met.

local WAITING, RUNNING = 'kvrelay:queue:waiting', 'kvrelay:queue:running'
local GATEWAYS, FINISHES = 'kvrelay:queue:gateways', 'kvrelay:queue:finishes'
local ACTIVE_TTL_MS = 3600 * 1000 -- the owner's poll writes a record anew that expires before its request ends
local QUARANTINE_TTL_MS = 3600 * 1000
local MOST_PROMOTED = 256 -- in one call
local FINISHES_KEPT = 32

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local quarantined = {}

local function record_key(id) return 'kvrelay:request:' .. id end
local function owned_key(gateway) return 'kvrelay:queue:owned:' .. gateway end
local function waiting_member(rank, id) return rank .. '/' .. id end
local function id_of(member) return string.match(member, '/(.+)$') end

local function quarantine(key)
  local aside = 'kvrelay:quarantine:' .. key
  redis.call('RENAME', key, aside)
  redis.call('PEXPIRE', aside, QUARANTINE_TTL_MS)
  quarantined[#quarantined + 1] = key
end

local function heal(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then quarantine(key) end
end

-- Called first by every script, for nothing that a script has written is taken back when a later command fails.
local function heal_queue(gateway)
  heal(WAITING, 'zset')
  heal(RUNNING, 'zset')
  heal(GATEWAYS, 'zset')
  heal(FINISHES, 'list')
  heal(owned_key(gateway), 'set')
end

local STATES = { waiting = true, running = true, finished = true }
local OUTCOMES = { [''] = true, completed = true, cancelled = true, failed = true, withdrawn = true }

-- The request's record, or nil. since: when its state began. start: which start of the gateway finished it.
local function read(id)
  local key = record_key(id)
  local values = redis.pcall('HMGET', key, 'state', 'digest', 'gateway', 'rank', 'since', 'outcome', 'start')
  if not values.err then
    local record = { state = values[1], digest = values[2], gateway = values[3], rank = values[4],
      since = tonumber(values[5] or ''), outcome = values[6], start = values[7] }
    if STATES[record.state] and record.digest and record.gateway and record.rank and record.since
      and OUTCOMES[record.outcome] then
      return record
    end
    if redis.call('EXISTS', key) == 0 then return nil end
  end
  quarantine(key)
  return nil
end

local function write(id, record, ttl)
  local key = record_key(id)
  redis.call('HSET', key, 'state', record.state, 'digest', record.digest, 'gateway', record.gateway,
    'rank', record.rank, 'since', now, 'outcome', record.outcome or '', 'start', record.start or '')
  redis.call('PEXPIRE', key, ttl)
end

-- Makes a request waiting or running, whatever it was before.
local function hold(id, record, state)
  record.state = state
  write(id, record, ACTIVE_TTL_MS)
  redis.call('SADD', owned_key(record.gateway), id)
  if state == 'running' then
    redis.call('ZREM', WAITING, waiting_member(record.rank, id))
    redis.call('ZADD', RUNNING, now, id)
  else
    redis.call('ZREM', RUNNING, id)
    redis.call('ZADD', WAITING, 0, waiting_member(record.rank, id))
  end
end

-- Takes a request out of queue and slots. Whether it had a slot.
local function release(id, record)
  heal(owned_key(record.gateway), 'set')
  redis.call('SREM', owned_key(record.gateway), id)
  redis.call('ZREM', WAITING, waiting_member(record.rank, id))
  return redis.call('ZREM', RUNNING, id) == 1
end

local function drop(id, record)
  release(id, record)
  redis.call('DEL', record_key(id))
end

-- Whether Redis remembers this gateway; if not it was wiped, and knows neither its requests.
local function is_known(gateway)
  return redis.call('ZSCORE', GATEWAYS, gateway) and true or false
end

-- Fills free slots from the front of the queue. Appends the ids of this gateway to `promoted`.
local function promote(gateway, max_running, promoted)
  for _ = 1, MOST_PROMOTED do
    if redis.call('ZCARD', RUNNING) >= max_running then break end
    local member = redis.call('ZPOPMIN', WAITING)[1]
    if not member then break end
    local id = id_of(member)
    local record = id and read(id)
    if record and record.state == 'waiting' and waiting_member(record.rank, id) == member then
      heal(owned_key(record.gateway), 'set')
      hold(id, record, 'running')
      if record.gateway == gateway then promoted[#promoted + 1] = id end
    end
  end
end
