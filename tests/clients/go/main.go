// A real clientv3 for the tests: each subcommand prints one JSON object per line on stdout.
//
//	clientv3 watch --endpoints=HOST:PORT[,...] --key=KEY [flags]   every response of one watch
//	clientv3 load --endpoints=HOST:PORT[,...] [flags]              puts and gets, or creates and updates; a summary at the end
//	clientv3 outage --endpoints=HOST:PORT[,...] [flags]           calls, a watch, a lease and a lock at once; a summary at the end
//	clientv3 crowd --endpoints=HOST:PORT[,...] [flags]            the load of a benchmark: many streams, a count of their events
//
// Times are seconds since the program began. A subcommand ends after --seconds, or when its stdin is closed.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

var (
	began  = time.Now()
	output sync.Mutex
)

type line map[string]any

// report prints one object, with the time.
func report(fields line) {
	fields["time"] = time.Since(began).Seconds()
	text, err := json.Marshal(fields)
	if err != nil {
		fail(err)
	}
	output.Lock()
	defer output.Unlock()
	fmt.Println(string(text))
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "error:", err)
	os.Exit(1)
}

// common are the flags that every subcommand has.
type common struct {
	endpoints string
	seconds   float64
	username  string
	password  string
	keepalive float64
}

func (c *common) register(flags *flag.FlagSet) {
	flags.StringVar(&c.endpoints, "endpoints", "", "HOST:PORT[,...]")
	flags.Float64Var(&c.seconds, "seconds", 60, "end after this time")
	flags.StringVar(&c.username, "username", "", "user name")
	flags.StringVar(&c.password, "password", "", "password")
	flags.Float64Var(&c.keepalive, "keepalive", 0, "seconds between HTTP/2 PINGs; 0: none")
}

func (c *common) client(options ...grpc.DialOption) *clientv3.Client {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            strings.Split(c.endpoints, ","),
		DialTimeout:          5 * time.Second,
		DialKeepAliveTime:    time.Duration(c.keepalive * float64(time.Second)),
		DialKeepAliveTimeout: time.Duration(c.keepalive * float64(time.Second)),
		Username:             c.username,
		Password:             c.password,
		DialOptions:          options,
		Logger:               zap.NewNop(),
	})
	if err != nil {
		fail(err)
	}
	return client
}

// context ends after --seconds or with stdin.
func (c *common) context() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(c.seconds*float64(time.Second)))
	go func() {
		_, _ = io.Copy(io.Discard, bufio.NewReader(os.Stdin))
		cancel()
	}()
	return ctx, cancel
}

func main() {
	commands := map[string]func([]string){"watch": watch, "load": load, "crowd": crowd, "outage": outage}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fail(fmt.Errorf("usage: %s watch|load|crowd|outage --endpoints=HOST:PORT[,...] [flags]", os.Args[0]))
	}
	commands[os.Args[1]](os.Args[2:])
}
