-- One task's (or saved group's) change: guard, document, notification, side record, history.
-- Guard and write are one script, so a stale writer loses whenever it comes.
--
-- KEYS  1 native key   2 {native}:k   3 {native}:w   4 {native}:h (only with history)
-- ARGV  1 new side record, packed (below)
--       2 'd' show ARGV[3], 'x' show nothing, '' no event that a document may show
--       3 document   4 its expiry, ms since 1970, '0' never   5 the side record's, if there is none yet
--       6 task id, '' for a group   7 prefix of clients' channels
--       8 history limit   9 its own retention in ms, '0' for ever, '' as long as the side record
--       10 with one: what happened by then is over   11… HLC, value, HLC, value …
--
-- A packed side record: order key >I4I4 | run >I4 | seen, sent, received, started, expires >I6 | attempts >I3
-- | event id (1 byte: its length, or 255/254 for a UUID of 36/32 characters in 16 bytes)
-- | workers, "\n" between, "\1" for "celery@".
-- Order keys have 63 bits and Lua's numbers 53: they are compared as two halves. Everything else is below 2^48.
-- Texts are compared by byte, because Lua's < follows the server's locale.
-- The frequent cases come first and define no functions: a closure costs as much as a command.
--
-- A client is told "<length of the id>:<id><document>"; without the document if it is large or there is none: it reads.
--
-- Returns 1 if what is shown changed, else 0.

local call, native, new, shows = redis.call, KEYS[1], ARGV[1], ARGV[2]
local NO_KEY, FIELDS, ID = '\0\0\0\0\0\0\0\0', '>I4I4I4I6I6I6I6I6I3', 46

local old = call('GET', KEYS[2])
local side, expires, wins = new, ARGV[5], shows ~= ''

-- What Celery's own backend wrote and our winner would replace: a SUCCESS stays, and what is ready stays against what is
-- not. It is theirs if we have no key, or one of a lower class: their workers went on with a task of ours. Celery writes
-- the status first, except in YAML, which sorts, begins with a letter, and begins a line with each top-level key.
if shows == 'd' then
  local class = -1
  if old and old:sub(1, 8) ~= NO_KEY then
    local a, b, c, d = old:byte(1, 4)
    class = math.floor(((a + b > 0 or c > 7) and d or c) / 2) % 4  -- order.py: of a known run, or of none
    if a + b + c + d == 0 then class = old:byte(8) % 4 end  -- … or of an import
  end
  local stock = class < 3 and call('GET', native)
  if stock then
    local at = stock:find('^%l') and stock:find('\nstatus: ', 1, true) or stock:find('status', 1, true)
    if at and (at <= 64 or stock:find('^%l')) then
      local status = stock:sub(at + 6, at + 22)
      if status:find('%f[%u_]SUCCESS%f[^%u_]') then
        wins = false
      else
        local a, b, c, d = new:byte(1, 4)
        local unready = math.floor(((a + b > 0 or c > 7) and d or c) / 2) % 4 == 0
        if a + b + c + d == 0 then unready = new:byte(8) % 4 == 0 end
        if unready and (class < 2 and status:find('%f[%u_]FAILURE%f[^%u_]')
            or class < 1 and status:find('%f[%u_]REVOKED%f[^%u_]')) then
          wins = false
        end
      end
    end
  end
end

if not old then
  if shows ~= '' and not wins then
    local n = new:byte(ID)
    side = NO_KEY .. new:sub(9, ID - 1) .. '\0' .. new:sub(ID + 1 + (n >= 254 and 16 or n))
  end
elseif old == new then
  wins = false
else
  local k1, k2, run, seen, sent, received, started, ends, attempts = struct.unpack(FIELDS, old)
  local K1, K2, Run, Seen, Sent, Received, Started, Ends, Attempts = struct.unpack(FIELDS, new)
  local n, N = old:byte(ID), new:byte(ID)
  n, N = ID + (n >= 254 and 16 or n), ID + (N >= 254 and 16 or N)

  local function less(a, b)
    for i = 1, math.min(#a, #b) do
      local x, y = a:byte(i), b:byte(i)
      if x ~= y then return x < y end
    end
    return #a < #b
  end
  local function earliest(a, b)
    if a == 0 then return b elseif b == 0 then return a end
    return math.min(a, b)
  end

  if wins then
    if k1 ~= K1 then wins = k1 < K1
    elseif k2 ~= K2 then wins = k2 < K2
    else
      local function event_id(s, last)
        local tag, raw = s:byte(ID), s:sub(ID + 1, last)
        if tag < 254 then return raw end
        local hex = raw:gsub('.', function(c) return string.format('%02x', c:byte()) end)
        if tag == 254 then return hex end
        return hex:gsub('^(........)(....)(....)(....)', '%1-%2-%3-%4-')
      end
      wins = less(event_id(old, n), event_id(new, N))
    end
  end

  local workers, more = old:sub(n + 1), new:sub(N + 1)
  if workers == '' then workers = more
  elseif more ~= '' and more ~= workers then
    local there, names = {}, {}
    for name in (workers .. '\n' .. more):gmatch('[^\n]+') do
      if not there[name] then there[name] = true; names[#names + 1] = name end
    end
    table.sort(names, less)
    workers = table.concat(names, '\n')
  end

  expires = (ends == 0 or Ends == 0) and 0 or math.max(ends, Ends)
  local winner, last = old, n
  if wins then winner, last, k1, k2 = new, N, K1, K2 end
  side = struct.pack(FIELDS, k1, k2, math.max(run, Run), math.max(seen, Seen), earliest(sent, Sent),
    earliest(received, Received), earliest(started, Started), expires, math.max(attempts, Attempts))
    .. winner:sub(ID, last) .. workers
  expires = string.format('%.0f', expires)
end

-- First what can be refused (a key of another type), so that nothing is half done.
if KEYS[4] then
  for i = 11, #ARGV, 2 do call('ZADD', KEYS[4], ARGV[i], ARGV[i + 1]) end
  if ARGV[8] ~= '0' then call('ZREMRANGEBYRANK', KEYS[4], 0, -1 - tonumber(ARGV[8])) end
  local kept = expires
  if ARGV[9] ~= '' then
    kept = ARGV[9]
    if kept ~= '0' then  -- from its latest event on, whichever came last
      call('ZREMRANGEBYSCORE', KEYS[4], '-inf', ARGV[10])
      local latest = call('ZRANGE', KEYS[4], -1, -1, 'WITHSCORES')[2]
      kept = latest and string.format('%.0f', latest + kept) or '0'
    end
  end
  if kept == '0' then call('PERSIST', KEYS[4]) else call('PEXPIREAT', KEYS[4], kept) end
end
if side ~= old then
  if expires == '0' then call('SET', KEYS[2], side) else call('SET', KEYS[2], side, 'PXAT', expires) end
end
if not wins then return 0 end

if shows == 'x' then
  call('DEL', native)
elseif ARGV[4] == '0' then
  call('SET', native, ARGV[3])
else
  call('SET', native, ARGV[3], 'PXAT', ARGV[4])
end
if ARGV[6] ~= '' then
  if shows == 'd' then call('PUBLISH', native, ARGV[3]) end
  local clients = redis.pcall('SMEMBERS', KEYS[3])
  if #clients > 0 then
    local said = #ARGV[6] .. ':' .. ARGV[6] .. (shows == 'd' and #ARGV[3] <= 8192 and ARGV[3] or '')
    for _, client in ipairs(clients) do call('PUBLISH', ARGV[7] .. client, said) end
  end
end
return 1
