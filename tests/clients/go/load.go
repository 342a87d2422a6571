package main

import (
	"context"
	"flag"
	"fmt"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
)

// tally counts the calls of one kind.
type tally struct {
	Done     int            `json:"done"`
	Lost     int            `json:"lost"`
	Errors   map[string]int `json:"errors"`
	SlowestS float64        `json:"slowest_s"`
	MedianS  float64        `json:"median_s"`
	took     []float64
}

// tallies are those of all kinds, and what each needed of tries.
type tallies struct {
	sync.Mutex
	byKind map[string]*tally
	tries  atomic.Int64
	most   atomic.Int64
}

type triesKey struct{}

// path is the way of one call: each try with its server, its seconds since the call began, and its end.
type path struct {
	sync.Mutex
	began time.Time
	tries []string
}

// counted counts a try of a call; clientv3's own interceptor, which repeats calls, is outside of it.
func (t *tallies) counted(
	ctx context.Context, method string, request, reply any, connection *grpc.ClientConn,
	invoker grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	t.tries.Add(1)
	one, ok := ctx.Value(triesKey{}).(*path)
	if !ok {
		return invoker(ctx, method, request, reply, connection, options...)
	}
	var server peer.Peer
	from := time.Since(one.began).Seconds()
	err := invoker(ctx, method, request, reply, connection, append(options, grpc.Peer(&server))...)
	one.Lock()
	defer one.Unlock()
	one.tries = append(one.tries, fmt.Sprintf("%.3f-%.3f %v %v", from, time.Since(one.began).Seconds(), server.Addr, err))
	most := int64(len(one.tries))
	for known := t.most.Load(); most > known && !t.most.CompareAndSwap(known, most); known = t.most.Load() {
	}
	return err
}

// call makes one call with a timeout and counts how it ended; a call that the end of the program cuts off is not counted.
func (t *tallies) call(parent context.Context, kind string, timeout time.Duration, do func(context.Context) error) bool {
	if parent.Err() != nil {
		return false
	}
	way := &path{began: time.Now()}
	ctx := context.WithValue(parent, triesKey{}, way)
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	err := do(ctx)
	took := time.Since(way.began).Seconds()
	if err != nil && parent.Err() != nil {
		return false
	}
	t.Lock()
	defer t.Unlock()
	one := t.byKind[kind]
	if one == nil {
		one = &tally{Errors: map[string]int{}}
		t.byKind[kind] = one
	}
	one.Done++
	one.took = append(one.took, took)
	if err != nil {
		one.Lost++
		one.Errors[err.Error()]++
		report(line{"kind": "lost", "call": kind, "error": err.Error(), "tries": way.tries})
	}
	return err == nil
}

func (t *tallies) print() {
	t.Lock()
	defer t.Unlock()
	fields := line{"kind": "summary", "tries": t.tries.Load(), "tries_most": t.most.Load()}
	for kind, one := range t.byKind {
		sort.Float64s(one.took)
		one.SlowestS, one.MedianS = one.took[len(one.took)-1], one.took[len(one.took)/2]
		fields[kind] = one
	}
	report(fields)
}

// load makes calls until its time is up, or --calls of each worker, and prints how they ended.
func load(arguments []string) {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	var with common
	with.register(flags)
	workers := flags.Int("workers", 1, "calls at a time")
	clients := flags.Int("clients", 1, "clients, each with connections of its own; workers share them in turn")
	timeout := flags.Float64("timeout", 10, "seconds each call may take; 0: no deadline")
	pause := flags.Float64("pause", 0, "seconds between the calls of a worker")
	calls := flags.Int("calls", 0, "rounds of each worker; 0: until the time is up")
	mode := flags.String("mode", "kv", "kv: a put and a get each round; kubernetes: a create, an update and a get, by transactions")
	key := flags.String("key", "load", "prefix of the keys")
	bytes := flags.Int("value-bytes", 0, "size of the values of --mode=kv; 0: a few")
	_ = flags.Parse(arguments)

	counts := &tallies{byKind: map[string]*tally{}}
	all := make([]*clientv3.Client, *clients)
	for i := range all {
		all[i] = with.client(grpc.WithChainUnaryInterceptor(counts.counted))
		defer all[i].Close()
	}
	ctx, cancel := with.context()
	defer cancel()
	rounds := map[string]func(worker, string, int){"kv": worker.kv, "kubernetes": worker.kubernetes}
	round := rounds[*mode]
	if round == nil {
		fail(fmt.Errorf("--mode is kv or kubernetes, not %s", *mode))
	}
	limit := time.Duration(*timeout * float64(time.Second))
	report(line{"kind": "started"})
	var running sync.WaitGroup
	for i := range *workers {
		running.Add(1)
		go func() {
			defer running.Done()
			one := worker{ctx, all[i%len(all)], counts, limit, strings.Repeat("x", *bytes)}
			for n := 0; ctx.Err() == nil && (*calls == 0 || n < *calls); n++ {
				round(one, fmt.Sprintf("%s/%d", *key, i), n)
				if *pause > 0 {
					select {
					case <-ctx.Done():
					case <-time.After(time.Duration(*pause * float64(time.Second))):
					}
				}
			}
		}()
	}
	running.Wait()
	counts.print()
}

type worker struct {
	ctx     context.Context
	client  *clientv3.Client
	counts  *tallies
	timeout time.Duration
	padding string
}

func (w worker) call(kind string, do func(context.Context) error) bool {
	return w.counts.call(w.ctx, kind, w.timeout, do)
}

func (w worker) kv(key string, round int) {
	w.call("puts", func(ctx context.Context) error {
		_, err := w.client.Put(ctx, key, fmt.Sprint(round)+w.padding)
		return err
	})
	w.call("gets", func(ctx context.Context) error {
		_, err := w.client.Get(ctx, key)
		return err
	})
}

// kubernetes makes the calls of the API server's store (storage/etcd3/store.go): Create, GuaranteedUpdate and Get.
func (w worker) kubernetes(key string, round int) {
	key = fmt.Sprintf("%s/%d", key, round)
	var revision int64
	created := w.call("creates", func(ctx context.Context) error {
		answer, err := w.client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, "created")).Commit()
		if err == nil && !answer.Succeeded {
			return fmt.Errorf("the key is there already: the create was done twice")
		}
		if err == nil {
			revision = answer.Header.Revision
		}
		return err
	})
	if !created {
		return
	}
	w.call("updates", func(ctx context.Context) error {
		answer, err := w.client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
			Then(clientv3.OpPut(key, "updated")).
			Else(clientv3.OpGet(key)).Commit()
		if err == nil && !answer.Succeeded {
			return fmt.Errorf("the key has changed: the update was done twice")
		}
		return err
	})
	w.call("gets", func(ctx context.Context) error {
		_, err := w.client.Get(ctx, key)
		return err
	})
}
