// Command fleet boots a fleet of nodes against a KMS with a request quota, and measures how long it takes until every node has
// its key, and how many requests that costs.
//
// The nodes are real clients of package keycache, with its retries, its jitter, the SDK and the clock, each with connections of its
// own over loopback. Identity and credentials come from an IMDS in this process, keys from a KMS in this process that
// decrypts what is within the quota and answers the rest with ThrottlingException.
//
//	go run ./test/bench/fleet [-nodes N,…] [-quota N,…] [-boot 10s] [-burst 1s] [-seed 1] [-csv FILE]
//
// Without -quota each size is tried with 25, 50, 70, 100 and 200 % of the rate at which its nodes boot. The columns, as the CSV
// names them; times are in seconds:
//
//	nodes              that boot at random moments within boot
//	quota              requests per second that KMS serves
//	boot, burst        what the flags say; burst is how much of a quota not used before is served at once
//	nodes_per_quota    nodes / quota
//	ideal              the longer one of boot and nodes_per_quota
//	ready              from the start until the last node has its key
//	ready_by_quota     ready / nodes_per_quota; the goal is 1.25 at most
//	ready_by_ideal     ready / ideal
//	requests_per_node  Decrypt requests; the goal is 1.5 at most
//	least_per_node     that no backoff can do without: first requests above the quota are lost
//	median, worst      from a node's boot until it has its key
//	most_requests      of one node
//	failed             nodes that gave up
//	other_errors       failed requests that were not throttled: a machine that is too slow
//	first_answer       the longest time from a node's boot to KMS's first answer: how late this machine is
package main

import (
	"context"
	"encoding/csv"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/bench/alone"
)

// shares of the rate at which nodes boot, in percent, that are tried as quota. Below 50 a second request of every second node cannot
// be avoided; at 100 and above there is hardly anything to wait for.
var shares = []float64{25, 50, 70, 100, 200}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := bench(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

func bench(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("fleet", flag.ContinueOnError)
	sizes := flags.String("nodes", "100,1000,10000", "sizes of the fleet")
	quotas := flags.String("quota", "", "requests per second that KMS serves (default 25, 50, 70, 100 and 200 % of nodes / boot)")
	boot := flags.Duration("boot", 10*time.Second, "in which the nodes boot")
	burst := flags.Duration("burst", time.Second, "of a quota not used before that is served at once")
	seed := flags.Uint64("seed", 1, "of the moments at which the nodes boot")
	to := flags.String("csv", "", "file to write the table to as CSV")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *boot <= 0 || *burst < 0 {
		return fmt.Errorf("cannot use %q: want flags only, -boot above 0 and -burst not below", args)
	}
	fleets, err := sweep(*sizes, *quotas, fleet{boot: *boot, burst: *burst, seed: *seed})
	if err != nil {
		return err
	}

	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	rows := [][]string{header()}
	fmt.Fprintln(table, strings.Join(rows[0], "\t")+"\t")
	for _, f := range fleets {
		var o outcome
		err = alone.With(func(t testing.TB) (err error) { o, err = f.run(ctx, t); return err })
		if err != nil {
			err = fmt.Errorf("cannot boot %d nodes: %w", f.nodes, err)
			break
		}
		fmt.Fprintf(os.Stderr, "%d nodes, %.4g per second: all ready after %.1f s\n", f.nodes, f.quota, o.ready.Seconds())
		rows = append(rows, o.row())
		fmt.Fprintln(table, strings.Join(o.row(), "\t")+"\t")
	}
	if e := table.Flush(); err == nil {
		err = e
	}
	if err != nil || *to == "" {
		return err
	}
	return writeCSV(*to, rows)
}

// sweep returns each size with each quota, and the rest as in like.
func sweep(sizes, quotas string, like fleet) ([]fleet, error) {
	nodes, err := numbers("-nodes", sizes)
	if err != nil {
		return nil, err
	}
	var fixed []float64
	if quotas != "" {
		if fixed, err = numbers("-quota", quotas); err != nil {
			return nil, err
		}
	}
	var fleets []fleet
	for _, n := range nodes {
		f := like
		f.nodes = int(n)
		perSecond := fixed
		if quotas == "" {
			for _, share := range shares {
				perSecond = append(perSecond, n/like.boot.Seconds()*share/100)
			}
		}
		for _, f.quota = range perSecond {
			fleets = append(fleets, f)
		}
	}
	return fleets, nil
}

func numbers(name, list string) ([]float64, error) {
	var all []float64
	for text := range strings.SplitSeq(list, ",") {
		n, err := strconv.ParseFloat(text, 64)
		if err != nil || !(n >= 1 && n <= 1e6) {
			return nil, fmt.Errorf("cannot use %s %q: want numbers from 1 to 1000000 with commas between", name, list)
		}
		all = append(all, n)
	}
	return all, nil
}

func header() []string {
	return []string{
		"nodes", "quota", "boot", "burst", "nodes_per_quota", "ideal", "ready", "ready_by_quota", "ready_by_ideal",
		"requests_per_node", "least_per_node", "median", "worst", "most_requests", "failed", "other_errors", "first_answer",
	}
}

// row has the columns of header.
func (o outcome) row() []string {
	number := func(v float64, digits int) string { return strconv.FormatFloat(v, 'f', digits, 64) }
	seconds := func(d time.Duration) string { return number(d.Seconds(), 2) }
	perNode := func(n int) string { return number(float64(n)/float64(o.nodes), 2) }
	return []string{
		strconv.Itoa(o.nodes), strconv.FormatFloat(o.quota, 'g', -1, 64), seconds(o.boot), seconds(o.burst), seconds(o.drain()), seconds(o.ideal()), seconds(o.ready),
		number(o.ready.Seconds()/o.drain().Seconds(), 2), number(o.ready.Seconds()/o.ideal().Seconds(), 2),
		perNode(o.requests), perNode(o.least), seconds(o.median), seconds(o.worst), strconv.Itoa(o.most),
		strconv.Itoa(o.failed), strconv.Itoa(o.other), seconds(o.late),
	}
}

func writeCSV(name string, rows [][]string) error {
	file, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("cannot write the table: %w", err)
	}
	defer file.Close()
	if err := csv.NewWriter(file).WriteAll(rows); err != nil {
		return fmt.Errorf("cannot write the table: %w", err)
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("cannot write the table: %w", err)
	}
	return nil
}
