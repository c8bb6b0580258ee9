-- Walks all paths of a file, each thread in a random order of its own.
local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("seed", threads)
end

function init(arguments)
  math.randomseed(seed)
  requests, at = {}, 0
  for path in io.lines(arguments[1]) do requests[#requests + 1] = wrk.format("GET", path) end
  for i = #requests, 2, -1 do
    local j = math.random(i)
    requests[i], requests[j] = requests[j], requests[i]
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  print(string.format("walked %d %d %d %d %d", summary.requests, summary.duration, errors.status, broken,
    latency:percentile(50)))
end
