// A tour with npm's etcd3 (grpc-js). Arguments: HOST PORT [CA CERT KEY]. Prints what it saw, one JSON line each.
import { readFileSync } from 'node:fs';
import { Etcd3 } from 'etcd3';

const [host, port, ...files] = process.argv.slice(2);
const [rootCertificate, certChain, privateKey] = files.map((file) => readFileSync(file));
const credentials = rootCertificate && { rootCertificate, certChain, privateKey };
const scheme = credentials ? 'https' : 'http';
const client = new Etcd3({ hosts: `${scheme}://${host}:${port}`, credentials, dialTimeout: 10000 });
const say = (...what) => console.log(JSON.stringify(what));

function collect(watcher, count) {
  const found = [];
  return new Promise((resolve) => {
    const note = (kind) => (kv, previous) => {
      found.push([kind, kv.key.toString(), kv.value.toString(), kv.mod_revision, previous ? previous.value.toString() : null]);
      if (found.length === count) resolve(found);
    };
    watcher.on('put', note('put'));
    watcher.on('delete', note('delete'));
  });
}

await client.put('k/a').value('1');
await client.put('k/b').value('2');
say('get', await client.get('k/a').string());
say('prefix', await client.getAll().prefix('k/').strings());
say('txn', (await client.if('k/a', 'Value', '==', '1').then(client.put('k/a').value('3')).commit()).succeeded);
const lease = client.lease(60);
await lease.put('leased').value('x');
say('lease', await client.get('leased').string());
await lease.revoke();
say('revoked', await client.get('leased').string());

const one = client.watch().key('w/one').withPreviousKV().watcher();
const more = client.watch().prefix('w/').only('put').watcher();
const past = client.watch().prefix('k/').startRevision(2).watcher();
const waits = [collect(one, 3), collect(more, 3), collect(past, 3)];
await Promise.all([one, more, past].map((watcher) => new Promise((resolve) => watcher.on('connected', resolve))));
await client.put('w/one').value('1');
await client.put('w/two').value('2');
await client.delete().key('w/one');
await client.put('w/one').value('3');
for (const [index, found] of (await Promise.all(waits)).entries()) say('watch', index, found);
for (const watcher of [one, more, past]) await watcher.cancel();
await client.lock('tour').ttl(10).do(async () => say('lock', true));
const election = client.election('tour-election');
const campaign = election.campaign('me');
await campaign.wait();
say('leader', await election.leader());
await campaign.resign();
say('status', (await client.maintenance.status()).version);
client.close();
