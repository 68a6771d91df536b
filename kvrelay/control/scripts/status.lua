-- Replies {number of waiting requests, number of running requests}.
local function count(key)
  local number = redis.pcall('ZCARD', key)
  return type(number) == 'number' and number or 0
end
return { count('kvrelay:queue:waiting'), count('kvrelay:queue:running') }
