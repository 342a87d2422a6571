package main

import (
	"context"
	"flag"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// watch prints each response of one watch, and how its channel ended.
func watch(arguments []string) {
	flags := flag.NewFlagSet("watch", flag.ExitOnError)
	var with common
	with.register(flags)
	key := flags.String("key", "", "key or prefix to watch")
	prefix := flags.Bool("prefix", false, "watch all keys with this prefix")
	revision := flags.Int64("rev", 0, "revision to start from; 0: now")
	notify := flags.Bool("progress-notify", false, "WithProgressNotify")
	fragment := flags.Bool("fragment", false, "WithFragment")
	previous := flags.Bool("prev-kv", false, "WithPrevKV")
	created := flags.Bool("created-notify", true, "WithCreatedNotify")
	leader := flags.Bool("require-leader", false, "WithRequireLeader")
	ask := flags.Float64("ask-progress", 0, "seconds between RequestProgress calls; 0: none")
	events := flags.Int("events", 0, "end after this many events; 0: do not")
	again := flags.Bool("again", false, "watch again, from the next revision, when the channel is closed")
	_ = flags.Parse(arguments)

	client := with.client()
	defer client.Close()
	ctx, cancel := with.context()
	defer cancel()
	streams := ctx
	if *leader {
		streams = clientv3.WithRequireLeader(ctx)
	}
	options := []clientv3.OpOption{}
	add := func(wanted bool, option clientv3.OpOption) {
		if wanted {
			options = append(options, option)
		}
	}
	add(*prefix, clientv3.WithPrefix())
	add(*notify, clientv3.WithProgressNotify())
	add(*fragment, clientv3.WithFragment())
	add(*previous, clientv3.WithPrevKV())
	add(*created, clientv3.WithCreatedNotify())
	if *ask > 0 {
		go askForProgress(streams, client, time.Duration(*ask*float64(time.Second)))
	}
	next, seen := *revision, 0
	for ctx.Err() == nil {
		channel := client.Watch(streams, *key, append(options, clientv3.WithRev(next))...)
		for response := range channel {
			describe(response)
			seen += len(response.Events)
			if last := response.Header.Revision; len(response.Events) > 0 || response.IsProgressNotify() {
				next = last + 1
			}
			if *events > 0 && seen >= *events {
				return
			}
		}
		report(line{"kind": "closed", "events": seen})
		if !*again {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func askForProgress(ctx context.Context, client *clientv3.Client, every time.Duration) {
	for ctx.Err() == nil {
		if err := client.RequestProgress(ctx); err != nil {
			report(line{"kind": "progress request failed", "error": err.Error()})
		}
		select {
		case <-ctx.Done():
		case <-time.After(every):
		}
	}
}

func describe(response clientv3.WatchResponse) {
	fields := line{
		"kind":             "response",
		"revision":         response.Header.Revision,
		"created":          response.Created,
		"canceled":         response.Canceled,
		"compact_revision": response.CompactRevision,
		"progress":         response.IsProgressNotify(),
		"events":           len(response.Events),
	}
	bytes := 0
	revisions := []int64{}
	for _, event := range response.Events {
		bytes += len(event.Kv.Key) + len(event.Kv.Value)
		revisions = append(revisions, event.Kv.ModRevision)
	}
	fields["bytes"], fields["revisions"] = bytes, revisions
	if err := response.Err(); err != nil {
		fields["error"] = err.Error()
	}
	report(fields)
}
