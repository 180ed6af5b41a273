-- Changes to some tasks, or to some saved groups: guard, document, notification, side record, history of each.
-- Guard and write are one script, so a stale writer loses whenever it comes. It reads for all, then writes one after the other.
--
-- KEYS  of n tasks: the native keys, then {native}:k of each, then {native}:w, then (only with history) {native}:h
-- ARGV  1 n   2 length of a task's native key before its id, '' for groups   3 prefix of clients' channels
--       4 history limit   5 its own retention in ms, '0' for ever, '' as long as the side record   6 with one: what
--       happened by then is over
--       7… of each task  its new side record, packed (below)
--                        the side record's expiry, ms since 1970, if there is none yet; '0' never
--                        the document's expiry; '=' the same; 'x' show nothing; '' no event that a document may show
--                        the document
--       …  with history, of each task: how many events, then HLC, value, HLC, value …
--
-- A packed side record: order key >I4I4 | run >I4 | seen, sent, received, started, expires >I6 | attempts >I3
-- | event id (1 byte: its length, or 255/254 for a UUID of 36/32 characters in 16 bytes)
-- | workers, "\n" between, "\1" for "celery@".
-- Order keys have 63 bits and Lua's numbers 53: they are compared as two halves. Everything else is below 2^48.
-- Texts are compared by byte, because Lua's < follows the server's locale.
--
-- A client is told "<length of the id>:<id><document>"; without the document if it is large or there is none: it reads.
--
-- An error leaves each task as it was or written, and in case of a key of another type the one that has it as it was.
-- Returns how many tasks show something else than before.

local call, n = redis.call, tonumber(ARGV[1])
local NO_KEY, FIELDS, ID = '\0\0\0\0\0\0\0\0', '>I4I4I4I6I6I6I6I6I3', 46
local BEFORE, EACH = 6, 4

local function rank(key)  -- order.py: of a known run, or of none; or of an import
  local a, b, c, d = key:byte(1, 4)
  if a + b + c + d == 0 then return key:byte(8) % 4 end
  return math.floor(((a + b > 0 or c > 7) and d or c) / 2) % 4
end

local function rank_of(record)
  return record and record:sub(1, 8) ~= NO_KEY and rank(record) or -1
end

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

local function end_of_id(record)
  local tag = record:byte(ID)
  return ID + (tag >= 254 and 16 or tag)
end

local function event_id(record)
  local tag, raw = record:byte(ID), record:sub(ID + 1, end_of_id(record))
  if tag < 254 then return raw end
  local hex = raw:gsub('.', function(c) return string.format('%02x', c:byte()) end)
  if tag == 254 then return hex end
  return hex:gsub('^(........)(....)(....)(....)', '%1-%2-%3-%4-')
end

-- What Celery's own backend wrote and our winner would replace: a SUCCESS stays, and what is ready stays against what is
-- not. It is theirs if we have no key, or one of a lower class: their workers went on with a task of ours. Celery writes
-- the status first, except in YAML, which sorts, begins with a letter, and begins a line with each top-level key.
local function stays(stock, class, new)
  local at = stock:find('^%l') and stock:find('\nstatus: ', 1, true) or stock:find('status', 1, true)
  if not at or at > 64 and not stock:find('^%l') then return false end
  local status = stock:sub(at + 6, at + 22)
  if status:find('%f[%u_]SUCCESS%f[^%u_]') then return true end
  return rank(new) == 0 and (class < 2 and status:find('%f[%u_]FAILURE%f[^%u_]')
    or class < 1 and status:find('%f[%u_]REVOKED%f[^%u_]'))
end

local function united(workers, more)
  if workers == '' then return more end
  if more == '' or more == workers then return workers end
  local there, names = {}, {}
  for name in (workers .. '\n' .. more):gmatch('[^\n]+') do
    if not there[name] then there[name] = true; names[#names + 1] = name end
  end
  table.sort(names, less)
  return table.concat(names, '\n')
end

-- Returns the record of both, its expiry as text, and whether the new one's event is shown; "wins" says if it may be.
local function merged(old, new, wins)
  local k1, k2, run, seen, sent, received, started, ends, attempts = struct.unpack(FIELDS, old)
  local K1, K2, Run, Seen, Sent, Received, Started, Ends, Attempts = struct.unpack(FIELDS, new)
  if wins then
    if k1 ~= K1 then wins = k1 < K1
    elseif k2 ~= K2 then wins = k2 < K2
    else wins = less(event_id(old), event_id(new)) end
  end
  local last, Last = end_of_id(old), end_of_id(new)
  local workers = united(old:sub(last + 1), new:sub(Last + 1))
  local expires = (ends == 0 or Ends == 0) and 0 or math.max(ends, Ends)
  local id = old:sub(ID, last)
  if wins then id, k1, k2 = new:sub(ID, Last), K1, K2 end
  return struct.pack(FIELDS, k1, k2, math.max(run, Run), math.max(seen, Seen), earliest(sent, Sent),
    earliest(received, Received), earliest(started, Started), expires, math.max(attempts, Attempts)) .. id .. workers,
    string.format('%.0f', expires), wins
end

local function remember(key, first, last, expires)
  for i = first, last, 2 do call('ZADD', key, ARGV[i], ARGV[i + 1]) end
  if ARGV[4] ~= '0' then call('ZREMRANGEBYRANK', key, 0, -1 - tonumber(ARGV[4])) end
  if ARGV[5] ~= '' then
    expires = ARGV[5]
    if expires ~= '0' then  -- from its latest event on, whichever came last
      call('ZREMRANGEBYSCORE', key, '-inf', ARGV[6])
      local latest = call('ZRANGE', key, -1, -1, 'WITHSCORES')[2]
      expires = latest and string.format('%.0f', latest + expires) or '0'
    end
  end
  if expires == '0' then call('PERSIST', key) else call('PEXPIREAT', key, expires) end
end

-- What is there, in a few calls for all: a call costs more than what it does.
local olds = call('MGET', unpack(KEYS, n + 1, 2 * n))
local asked, places, there = {}, {}, 0
for i = 1, n do
  local shows = ARGV[BEFORE + EACH * i - 1]
  if olds[i] then there = there + 1 end
  if shows ~= '' and shows ~= 'x' and rank_of(olds[i]) < 3 then
    asked[#asked + 1], places[#places + 1] = KEYS[i], i
  end
end
local stocks = {}
if asked[1] then
  for j, stock in ipairs(call('MGET', unpack(asked))) do
    stocks[places[j]] = stock
    if stock then there = there + 1 end
  end
end
-- MGET says of a key of another type that it is not there.
local exist = call('EXISTS', unpack(KEYS, n + 1, 2 * n)) + (asked[1] and call('EXISTS', unpack(asked)) or 0)
if exist ~= there then
  for i = n + 1, 2 * n do call('GET', KEYS[i]) end
  for _, native in ipairs(asked) do call('GET', native) end
end
local waited = ARGV[2] ~= '' and call('EXISTS', unpack(KEYS, 2 * n + 1, 3 * n)) > 0

local at, events, changed = BEFORE, BEFORE + EACH * n, 0
for i = 1, n do
  local native, old, new, expires, shows = KEYS[i], olds[i], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local document, side, wins = ARGV[at + 4], new, shows ~= ''
  local until_ = shows == '=' and expires or shows
  at = at + EACH

  if stocks[i] and stays(stocks[i], rank_of(old), new) then wins = false end
  if old == new then wins = false
  elseif old then side, expires, wins = merged(old, new, wins)
  elseif shows ~= '' and not wins then
    side = NO_KEY .. new:sub(9, ID - 1) .. '\0' .. new:sub(end_of_id(new) + 1)
  end

  -- First what can be refused (a key of another type), so that nothing is half done.
  if KEYS[3 * n + i] then
    local last = events + 1 + 2 * tonumber(ARGV[events + 1])
    if last > events + 1 then remember(KEYS[3 * n + i], events + 2, last, expires) end
    events = last
  end
  if side ~= old then
    if expires == '0' then call('SET', KEYS[n + i], side) else call('SET', KEYS[n + i], side, 'PXAT', expires) end
  end
  if wins then
    changed = changed + 1
    if shows == 'x' then call('DEL', native)
    elseif until_ == '0' then call('SET', native, document)
    else call('SET', native, document, 'PXAT', until_) end
    if ARGV[2] ~= '' and shows ~= 'x' then call('PUBLISH', native, document) end
    local clients = waited and redis.pcall('SMEMBERS', KEYS[2 * n + i]) or {}
    if #clients > 0 then
      local id = native:sub(ARGV[2] + 1)
      local said = #id .. ':' .. id .. (#document <= 8192 and document or '')
      for _, client in ipairs(clients) do call('PUBLISH', ARGV[3] .. client, said) end
    end
  end
end
return changed
