package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
)

// The benchmark's load generator (tests/bench/load.py) marks values like this: the marker, then the time of the write.
const (
	marker      = "@wm@"
	stampDigits = 20
)

// score counts what all watches of a crowd have received.
type score struct {
	sync.Mutex
	created  atomic.Int64
	stamps   atomic.Int64
	expected int64
	complete chan struct{}
	delays   []int64
	first    int64
	last     int64
}

func monotonic() int64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		fail(err)
	}
	return now.Nano()
}

// follow counts the events of one watch.
func (s *score) follow(channel clientv3.WatchChan) {
	for response := range channel {
		if response.Created {
			s.created.Add(1)
		}
		if len(response.Events) == 0 {
			continue
		}
		now := monotonic()
		delays := make([]int64, 0, len(response.Events))
		for _, event := range response.Events {
			if at := bytes.Index(event.Kv.Value, []byte(marker)); at >= 0 {
				digits := event.Kv.Value[at+len(marker) : at+len(marker)+stampDigits]
				if written, err := strconv.ParseInt(string(digits), 10, 64); err == nil {
					delays = append(delays, now-written)
				}
			}
		}
		s.Lock()
		s.delays = append(s.delays, delays...)
		if s.first == 0 {
			s.first = now
		}
		s.last = now
		s.Unlock()
		if s.stamps.Add(int64(len(delays))) >= s.expected {
			select {
			case s.complete <- struct{}{}:
			default:
			}
		}
	}
}

// still waits until the count stays the same for some seconds, or all is complete.
func (s *score) still(count *atomic.Int64, wanted int64) {
	last, since := int64(-1), time.Now()
	for count.Load() < wanted && time.Since(since) < 15*time.Second {
		if now := count.Load(); now != last {
			last, since = now, time.Now()
		}
		select {
		case <-s.complete:
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// crowd opens watches as a case of the benchmark does and counts their events; it takes the place of tests/bench/load.py:
// each line on stdin lets it go on, and each report is one JSON object.
func crowd(arguments []string) {
	flags := flag.NewFlagSet("crowd", flag.ExitOnError)
	var with common
	with.register(flags)
	connections := flags.Int("connections", 1, "clients, each with a connection of its own")
	streams := flags.Int("streams", 1, "Watch streams in all")
	watches := flags.Int("watches", 1, "watches on each stream")
	ranges := flags.Int("ranges", 1, "ranges, distributed over the watches in turn")
	expected := flags.Int64("expected", 0, "events that the watches receive")
	_ = flags.Parse(arguments)

	count := &score{expected: *expected, complete: make(chan struct{}, 1)}
	began := time.Now()
	number := 0
	share, rest := *streams / *connections, *streams%*connections
	for index := 0; index < *connections; index++ {
		client := with.client()
		defer client.Close()
		own := share
		if index < rest {
			own++
		}
		for stream := 0; stream < own; stream++ {
			watcher := clientv3.NewWatcher(client)
			for watch := 0; watch < *watches; watch++ {
				key := fmt.Sprintf("bench/%06d/", number%*ranges)
				number++
				// Watch returns once the watch is created, so each has a goroutine.
				go func() {
					count.follow(watcher.Watch(
						context.Background(), key, clientv3.WithPrefix(), clientv3.WithCreatedNotify(),
					))
				}()
			}
		}
	}
	count.still(&count.created, int64(number))
	lines := bufio.NewReader(os.Stdin)
	say(line{
		"ready": count.created.Load() == int64(number), "created": count.created.Load(),
		"create_s": time.Since(began).Seconds(), "stamps": 0,
	})
	_, _ = lines.ReadString('\n')
	count.still(&count.stamps, *expected)
	count.report()
	_, _ = lines.ReadString('\n')
}

func (s *score) report() {
	s.Lock()
	defer s.Unlock()
	sort.Slice(s.delays, func(a, b int) bool { return s.delays[a] < s.delays[b] })
	at := func(share float64) float64 {
		if len(s.delays) == 0 {
			return 0
		}
		return float64(s.delays[min(len(s.delays)-1, int(share*float64(len(s.delays))))]) / 1e6
	}
	var used syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	stamps := s.stamps.Load()
	say(line{
		"stamps": stamps, "missing": s.expected - stamps, "broken": 0,
		"stamps_s":   float64(stamps) / max(1e-9, float64(s.last-s.first)/1e9),
		"load_cpu_s": float64(used.Utime.Nano()+used.Stime.Nano()) / 1e9,
		"p50_ms":     at(0.5), "p99_ms": at(0.99), "p100_ms": at(1),
	})
}

// say prints one object as tests/bench/load.py does, without the time.
func say(fields line) {
	text, err := json.Marshal(fields)
	if err != nil {
		fail(err)
	}
	fmt.Println(string(text))
}
