// Three thousand calls with one deadline (npm's grpc-js), beside a watch on the same connection. Arguments: HOST PORT.
// Prints "watching"; makes the calls when a line comes in and prints how they ended; prints "event" for each event.
import grpc from '@grpc/grpc-js';
import readline from 'node:readline';

const [host, port] = process.argv.slice(2);
const client = new grpc.Client(`${host}:${port}`, grpc.credentials.createInsecure());
const asIs = (bytes) => bytes;
const key = Buffer.from('\x0a\x04mine', 'latin1');

const watch = client.makeBidiStreamRequest('/etcdserverpb.Watch/Watch', asIs, asIs);
let created = false;
watch.on('data', () => {
  console.log(created ? 'event' : 'watching');
  created = true;
});
watch.on('error', (error) => console.log(`the watch ended: ${error.code}`));
watch.write(Buffer.concat([Buffer.from([0x0a, key.length]), key]));

const call = (deadline) => new Promise((done) => {
  client.makeUnaryRequest('/etcdserverpb.KV/Range', asIs, asIs, key, { deadline }, (error) => done(error ? error.code : 0));
});
for await (const line of readline.createInterface({ input: process.stdin })) {
  const deadline = Date.now() + Number(line);
  const codes = await Promise.all(Array.from({ length: 3000 }, () => call(deadline)));
  console.log(`${codes.filter((code) => code === grpc.status.DEADLINE_EXCEEDED).length} ended by their deadline`);
}
process.exit(0);
