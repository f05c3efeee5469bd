// Runs the tests in PACKAGE against the proxy at BASE: node run.mjs PACKAGE BASE KNOWN
import fs from 'node:fs'
import http from 'node:http'

const [directory, base, known] = process.argv.slice(2)
const { runTests, getResults } = await import(`${directory}/client/runner.mjs`)
const { default: suites } = await import(`${directory}/tests/index.mjs`)
const expected = new Set(fs.readFileSync(known, 'utf8').split('\n').map(line => line.split(' ')[0]))

// What a test sees of the fields: all lines, joined, whatever stands in them.
class Fields extends Map {
  get (name) { return super.get(name.toLowerCase()) ?? null }
  has (name) { return super.has(name.toLowerCase()) }
}

// `fetch` without a cache, a pool or an opinion of its own.
function fetch (url, init = {}) {
  return new Promise((resolve, reject) => {
    const headers = {}
    for (const [name, value] of init.headers || []) {
      headers[name] = name in headers ? [].concat(headers[name], value) : value
    }
    if (init.body) headers['content-length'] = Buffer.byteLength(init.body)
    const request = http.request(url, { method: init.method || 'GET', headers, agent: false, insecureHTTPParser: true })
    request.on('error', reject)
    request.on('response', response => {
      const fields = new Fields()
      for (let n = 0; n < response.rawHeaders.length; n += 2) {
        const [name, value] = [response.rawHeaders[n].toLowerCase(), response.rawHeaders[n + 1]]
        fields.set(name, fields.has(name) ? `${fields.get(name)}, ${value}` : value)
      }
      const body = []
      response.on('data', data => body.push(data))
      response.on('error', reject)
      response.on('end', () => resolve({
        status: response.statusCode,
        statusText: response.statusMessage,
        headers: fields,
        text: async () => Buffer.concat(body).toString()
      }))
    })
    request.end(init.body)
  })
}

async function ready () {
  for (let turn = 0; turn < 200; turn++) {
    const answer = await fetch(`${base}/`).catch(() => null)
    if (answer && answer.status !== 502) return
    await new Promise(resolve => setTimeout(resolve, 50))
  }
  throw new Error(`nobody answers at ${base}`)
}

await ready()
await runTests(suites, fetch, false, base, 40)
const results = getResults()
const counts = {}
let unexpected = 0
for (const { id, kind = 'required' } of suites.flatMap(suite => suite.tests)) {
  // Tests of browsers were not run.
  if (results[id] === undefined) continue
  const passed = results[id] === true
  const count = counts[kind] ??= { passed: 0, all: 0 }
  count.all += 1
  count.passed += passed
  if (passed || kind === 'check') continue
  const surprise = kind === 'required' && !expected.has(id)
  unexpected += surprise
  console.log(`${surprise ? 'UNEXPECTED ' : ''}${kind} ${id}: ${results[id][1]}`)
}
for (const kind of ['required', 'optimal']) console.log(`${kind}: ${counts[kind].passed} of ${counts[kind].all}`)
process.exit(unexpected ? 1 : 0)
