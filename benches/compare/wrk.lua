-- wrk ... -s wrk.lua URL -- METHOD BODY_BYTES
-- Prints one line "JSON {...}" at the end; times are microseconds.
function init(args)
  wrk.method = args[1]
  local bytes = tonumber(args[2])
  if bytes > 0 then
    wrk.body = string.rep("x", bytes)
    wrk.headers["Content-Type"] = "application/octet-stream"
  end
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'JSON {"count":%d,"secs":%.6f,"p50":%.0f,"p99":%.0f,"errors":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
