"""A long run of everything at once: a real etcd, the proxy as a process, many kinds of clients, and faults at random.

`python -m tests.soak --minutes n`. What a test of one fault cannot show is what many leave behind together: an event
lost once in a million, a descriptor kept each time, memory that never comes back.
"""
