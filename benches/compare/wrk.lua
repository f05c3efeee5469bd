-- wrk ... -s wrk.lua URL -- METHOD BODY_BYTES [KEYS]
-- KEYS: so many URLs in turn, that differ in their query. Prints one line "JSON {...}" at the end; times are microseconds.
function init(args)
  wrk.method = args[1]
  local bytes = tonumber(args[2])
  if bytes > 0 then
    wrk.body = string.rep("x", bytes)
    wrk.headers["Content-Type"] = "application/octet-stream"
  end
  local keys = tonumber(args[3] or 1)
  if keys > 1 then
    local requests, at = {}, 0
    for n = 1, keys do
      requests[n] = wrk.format(nil, wrk.path .. "?n=" .. n)
    end
    request = function()
      at = at % keys + 1
      return requests[at]
    end
  end
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'JSON {"count":%d,"secs":%.6f,"p50":%.0f,"p99":%.0f,"errors":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
