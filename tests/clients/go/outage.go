package main

import (
	"context"
	"flag"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// outage uses etcd in every way at once until its time is up or stdin is closed, and prints how each use went: what
// failed, with which error, and the longest time without a success.
func outage(arguments []string) {
	flags := flag.NewFlagSet("outage", flag.ExitOnError)
	var with common
	with.register(flags)
	timeout := flags.Float64("timeout", 0, "seconds each call may take; 0: no deadline")
	ttl := flags.Int64("ttl", 60, "seconds that leases live")
	_ = flags.Parse(arguments)
	client := with.client()
	defer client.Close()
	ctx, cancel := with.context()
	defer cancel()
	use := &uses{ctx: ctx, client: client, timeout: time.Duration(*timeout * float64(time.Second)), all: map[string]*usage{}}
	var running sync.WaitGroup
	for _, one := range []func(){use.puts, use.gets, use.transactions, use.watch, func() { use.leases(*ttl) }, func() { use.locks(int(*ttl)) }} {
		running.Add(1)
		go func() { defer running.Done(); one() }()
	}
	report(line{"kind": "started"})
	running.Wait()
	use.print()
}

// usage is what one kind of use experienced.
type usage struct {
	Done   int            `json:"done"`
	Errors map[string]int `json:"errors"`
	GapS   float64        `json:"gap_s"`
	last   time.Time
}

type uses struct {
	sync.Mutex
	ctx     context.Context
	client  *clientv3.Client
	timeout time.Duration
	all     map[string]*usage
}

// ended counts the end of one use.
func (u *uses) ended(kind string, err error) {
	if u.ctx.Err() != nil {
		return
	}
	u.Lock()
	defer u.Unlock()
	one := u.all[kind]
	if one == nil {
		one = &usage{Errors: map[string]int{}, last: began}
		u.all[kind] = one
	}
	if err != nil {
		one.Errors[err.Error()]++
		return
	}
	one.Done++
	if gap := time.Since(one.last).Seconds(); one.Done > 1 && gap > one.GapS {
		one.GapS = gap
	}
	one.last = time.Now()
}

// call makes one call with the timeout.
func (u *uses) call(kind string, do func(context.Context) error) error {
	ctx := u.ctx
	if u.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, u.timeout)
		defer cancel()
	}
	err := do(ctx)
	u.ended(kind, err)
	return err
}

func (u *uses) pause() {
	select {
	case <-u.ctx.Done():
	case <-time.After(20 * time.Millisecond):
	}
}

func (u *uses) puts() {
	for n := 0; u.ctx.Err() == nil; n++ {
		_ = u.call("puts", func(ctx context.Context) error {
			_, err := u.client.Put(ctx, fmt.Sprintf("p/%d", n), "x")
			return err
		})
		u.pause()
	}
}

func (u *uses) gets() {
	for u.ctx.Err() == nil {
		_ = u.call("gets", func(ctx context.Context) error {
			_, err := u.client.Get(ctx, "counter")
			return err
		})
		u.pause()
	}
}

// transactions count one key up, by comparing and setting.
func (u *uses) transactions() {
	var revision int64
	for n := 0; u.ctx.Err() == nil; n++ {
		_ = u.call("txns", func(ctx context.Context) error {
			answer, err := u.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision("counter"), "=", revision)).
				Then(clientv3.OpPut("counter", fmt.Sprint(n))).Else(clientv3.OpGet("counter")).Commit()
			if err != nil {
				return err
			}
			if answer.Succeeded {
				revision = answer.Header.Revision
			} else if found := answer.Responses[0].GetResponseRange().Kvs; len(found) > 0 {
				revision = found[0].ModRevision
			}
			return nil
		})
		u.pause()
	}
}

// watch follows all puts and counts the responses.
func (u *uses) watch() {
	for u.ctx.Err() == nil {
		for answer := range u.client.Watch(u.ctx, "p/", clientv3.WithPrefix()) {
			if answer.Err() != nil {
				u.ended("watch", answer.Err())
			}
			for range answer.Events {
				u.ended("watch", nil)
			}
		}
		u.ended("watch", fmt.Errorf("the watch was closed"))
		u.pause()
	}
}

// leases keep one lease alive, and grant another one when it is lost.
func (u *uses) leases(ttl int64) {
	for u.ctx.Err() == nil {
		var granted *clientv3.LeaseGrantResponse
		if u.call("grants", func(ctx context.Context) (err error) { granted, err = u.client.Grant(ctx, ttl); return }) != nil {
			u.pause()
			continue
		}
		alive, err := u.client.KeepAlive(u.ctx, granted.ID)
		if err != nil {
			u.ended("keepalives", err)
			u.pause()
			continue
		}
		for range alive {
			u.ended("keepalives", nil)
		}
		u.ended("keepalives", fmt.Errorf("the channel was closed"))
	}
}

// locks take and release a lock with a session, and take another session when it is lost.
func (u *uses) locks(ttl int) {
	for u.ctx.Err() == nil {
		session, err := concurrency.NewSession(u.client, concurrency.WithTTL(ttl), concurrency.WithContext(u.ctx))
		if err != nil {
			u.ended("locks", fmt.Errorf("session: %w", err))
			u.pause()
			continue
		}
		mutex := concurrency.NewMutex(session, "lock")
		for u.ctx.Err() == nil {
			if u.call("locks", mutex.Lock) != nil || u.call("unlocks", mutex.Unlock) != nil {
				break
			}
			u.pause()
			select {
			case <-session.Done():
				u.ended("locks", fmt.Errorf("the session was lost"))
			default:
				continue
			}
			break
		}
		_ = session.Close()
	}
}

func (u *uses) print() {
	u.Lock()
	defer u.Unlock()
	fields := line{"kind": "summary"}
	for kind, one := range u.all {
		fields[kind] = one
	}
	report(fields)
}
