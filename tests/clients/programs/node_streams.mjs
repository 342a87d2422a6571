// Watch streams with grpc-js on one connection, until killed. Arguments: HOST PORT STREAMS REQUEST (a WatchRequest, hex).
// Node finds packages next to the program.
import grpc from '@grpc/grpc-js';

const [host, port, streams, request] = process.argv.slice(2);
const client = new grpc.Client(`${host}:${port}`, grpc.credentials.createInsecure());
const same = (bytes) => bytes;
for (let stream = 0; stream < Number(streams); stream += 1) {
  const call = client.makeBidiStreamRequest('/etcdserverpb.Watch/Watch', same, same);
  call.on('data', () => {});
  call.on('error', (error) => console.error(String(error)));
  call.write(Buffer.from(request, 'hex'));
}
