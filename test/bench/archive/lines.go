package main

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

// kind is what a log is made of.
type kind string

const (
	ordinary kind = "ordinary" // what the services of a node write
	noise    kind = "noise"    // what no compression makes smaller: the largest pieces that there can be
)

// writeLog writes whole lines, as many as fit into size bytes. The same seed makes the same log.
func writeLog(w io.Writer, k kind, size int64, seed uint64) error {
	g := newGenerator(seed)
	next := g.line
	if k == noise {
		next = g.noise
	}
	out := bufio.NewWriterSize(w, 1<<20)
	for line := next(nil); int64(len(line)) <= size; line = next(line[:0]) {
		size -= int64(len(line))
		if _, err := out.Write(line); err != nil {
			return err
		}
	}
	return out.Flush()
}

// generator makes up lines as of a node of a cluster: few templates, names that come again, and numbers, ids and times that do not.
type generator struct {
	*rand.Rand
	at         time.Time
	hosts      []string
	containers []string
	users      []string
}

func newGenerator(seed uint64) *generator {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, seed)), at: time.Date(2026, 1, 31, 8, 0, 0, 0, time.UTC)}
	for range 200 {
		g.hosts = append(g.hosts, fmt.Sprintf("ip-10-%d-%d-%d", g.IntN(4), g.IntN(256), g.IntN(256)))
		g.containers = append(g.containers, fmt.Sprintf("container_1769846400123_%04d_%02d_%06d", g.IntN(40), 1+g.IntN(2), g.IntN(500)))
	}
	for i := range 30 {
		g.users = append(g.users, fmt.Sprintf("user%02d", i))
	}
	return g
}

func pick[T any](g *generator, all []T) T { return all[g.IntN(len(all))] }

// line appends the next line.
func (g *generator) line(b []byte) []byte {
	g.at = g.at.Add(time.Duration(g.ExpFloat64() * float64(3*time.Millisecond)))
	stamp, host := g.at.Format("2006-01-02 15:04:05,000"), pick(g, g.hosts)
	switch g.IntN(12) {
	case 0, 1:
		return fmt.Appendf(b, "%s INFO org.apache.hadoop.hdfs.server.datanode.DataNode (PacketResponder): Received block BP-%d-10.0.0.5-1769846400123:blk_%d_%d size %d from /%s:%d\n",
			stamp, 1769846400, g.Uint32(), 1000+g.IntN(1<<20), g.IntN(128<<20), host, 32768+g.IntN(28000))
	case 2, 3:
		return fmt.Appendf(b, "%s INFO org.apache.hadoop.yarn.server.nodemanager.containermanager.monitor.ContainersMonitorImpl (Container Monitor): Memory usage of ProcessTree %d for container-id %s: %.1f MB of 3 GB physical memory used; %.1f GB of 15 GB virtual memory used\n",
			stamp, 1000+g.IntN(64000), pick(g, g.containers), g.Float64()*3000, 2+g.Float64()*4)
	case 4:
		return fmt.Appendf(b, "%s INFO org.apache.spark.executor.Executor (Executor task launch worker for task %d.0 in stage %d.0 (TID %d)): Finished task %d.0 in stage %d.0 (TID %d). %d bytes result sent to driver\n",
			stamp, g.IntN(4000), g.IntN(300), g.IntN(1e6), g.IntN(4000), g.IntN(300), g.IntN(1e6), 1000+g.IntN(4000))
	case 5, 6:
		return fmt.Appendf(b, "%s %s audit[%d]: allowed=true ugi=%s (auth:SIMPLE) ip=/%s cmd=%s src=/data/warehouse/events/dt=2026-01-%02d/part-%05d-%08x.snappy.parquet dst=null perm=null proto=rpc\n",
			g.at.Format(time.StampMilli), host, 2000+g.IntN(100), pick(g, g.users), pick(g, g.hosts), pick(g, []string{"open", "getfileinfo", "listStatus", "create", "rename"}), 1+g.IntN(31), g.IntN(2000), g.Uint32())
	case 7, 8:
		return fmt.Appendf(b, "10.%d.%d.%d - - [%s] \"%s /api/v1/%s/%d?limit=%d HTTP/1.1\" %d %d \"-\" \"Mozilla/5.0 (X11; Linux x86_64)\" %.3f %016x\n",
			g.IntN(4), g.IntN(256), g.IntN(256), g.at.Format("02/Jan/2006:15:04:05 -0700"), pick(g, []string{"GET", "GET", "GET", "POST", "PUT"}), pick(g, []string{"users", "orders", "items", "sessions"}),
			g.IntN(1e6), 10*(1+g.IntN(10)), pick(g, []int{200, 200, 200, 200, 201, 304, 404, 500}), g.IntN(60000), g.ExpFloat64()/5, g.Uint64())
	case 9:
		return fmt.Appendf(b, "I%s %7d kubelet.go:%d] \"SyncLoop (PLEG): event for pod\" pod=\"%s/%s-%08x-%05x\" event={\"Type\":\"%s\",\"Data\":\"%016x%016x\"}\n",
			g.at.Format("0102 15:04:05.000000"), 1+g.IntN(9999), 1000+g.IntN(1500), pick(g, g.users), pick(g, []string{"web", "worker", "cache", "ingest"}), g.Uint32(), g.Uint32()>>12,
			pick(g, []string{"ContainerStarted", "ContainerDied"}), g.Uint64(), g.Uint64())
	case 10:
		return fmt.Appendf(b, "%s WARN org.apache.hadoop.ipc.Client (IPC Client (%d) connection to %s/10.0.0.5:8020 from %s): Slow RPC: took %d ms to send request, retry policy is RetryUpToMaximumCountWithFixedSleep(maxRetries=%d, sleepTime=1000 MILLISECONDS)\n",
			stamp, g.Uint32(), host, pick(g, g.users), 1000+g.IntN(30000), 1+g.IntN(10))
	default:
		return fmt.Appendf(b, "%s ERROR org.apache.spark.scheduler.TaskSetManager (dispatcher-event-loop-%d): Lost task %d.%d in stage %d.0 (TID %d) (%s.ec2.internal executor %d): java.io.IOException: Connection reset by peer\n\tat sun.nio.ch.FileDispatcherImpl.read0(Native Method)\n\tat sun.nio.ch.SocketDispatcher.read(SocketDispatcher.java:39)\n\tat io.netty.channel.socket.nio.NioSocketChannel.doReadBytes(NioSocketChannel.java:%d)\n",
			stamp, g.IntN(8), g.IntN(4000), g.IntN(4), g.IntN(300), g.IntN(1e6), host, g.IntN(64), 100+g.IntN(300))
	}
}

// noise appends a line of random bytes.
func (g *generator) noise(b []byte) []byte {
	for range 25 {
		v := g.Uint64()
		for range 8 {
			if c := byte(v); c != '\n' {
				b = append(b, c)
			}
			v >>= 8
		}
	}
	return append(b, '\n')
}
