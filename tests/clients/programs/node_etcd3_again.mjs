// A watch with npm's etcd3 that starts again whenever it fails, as a careful application does. Arguments: HOST PORT.
// Prints "watching" for each start and the value of each put, one a line, until killed.
import { Etcd3 } from 'etcd3';

const [host, port] = process.argv.slice(2);
const client = new Etcd3({ hosts: `http://${host}:${port}`, dialTimeout: 10000 });

function start() {
  const watcher = client.watch().prefix('w/').watcher();
  watcher.once('connected', () => console.log('watching'));
  watcher.on('put', (kv) => console.log(kv.value.toString()));
  watcher.on('error', (error) => {
    console.log('failed', String(error));
    setTimeout(start, 100);
  });
}

start();
