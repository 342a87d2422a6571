// A watch with npm's etcd3 (grpc-js) of a prefix from revision 1 on, until killed. Arguments: ENDPOINTS PREFIX.
// Prints the value of each put, one a line.
import { Etcd3 } from 'etcd3';

const [endpoints, prefix] = process.argv.slice(2);
const client = new Etcd3({ hosts: endpoints.split(',').map((each) => `http://${each}`), dialTimeout: 10000 });
const watcher = client.watch().prefix(prefix).startRevision(1).watcher();
watcher.on('put', (kv) => console.log(kv.value.toString()));
watcher.on('error', (error) => console.error(String(error)));
