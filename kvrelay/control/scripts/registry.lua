-- What the scripts of the registry share.
--
-- kvrelay:members           set: every member that has a lease, as "worker:ID" or "gateway:ID"
-- kvrelay:lease:MEMBER      string: its signed lease; expires
-- kvrelay:epoch:MEMBER      string: the highest epoch given out; expires after a day of silence
-- kvrelay:quarantine:MEMBER what was found in the place of a lease and is none; expires

local MEMBERS = 'kvrelay:members'
local EPOCH_TTL_MS = 24 * 3600 * 1000
local QUARANTINE_TTL_MS = 3600 * 1000

local function lease_key(member) return 'kvrelay:lease:' .. member end
local function epoch_key(member) return 'kvrelay:epoch:' .. member end

local function quarantine(key, member)
  local aside = 'kvrelay:quarantine:' .. member
  redis.pcall('RENAME', key, aside)
  redis.pcall('PEXPIRE', aside, QUARANTINE_TTL_MS)
end

local function heal_members()
  local kind = redis.call('TYPE', MEMBERS).ok
  if kind ~= 'set' and kind ~= 'none' then quarantine(MEMBERS, 'members') end
end

-- The highest epoch given out, as far as this Redis knows; what is no epoch counts as none and is overwritten later.
local function known_epoch(member)
  local value = redis.pcall('GET', epoch_key(member))
  local epoch = type(value) == 'string' and tonumber(value)
  return epoch and epoch > 0 and epoch < 2 ^ 53 and epoch or 0
end

local function remember_epoch(member, epoch)
  redis.call('SET', epoch_key(member), string.format('%.0f', epoch), 'PX', EPOCH_TTL_MS)
end
