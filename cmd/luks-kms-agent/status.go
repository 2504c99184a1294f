package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newStatus(opts *globalOptions) *cobra.Command {
	asJSON, again, interval := false, false, 2*time.Second
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how the volumes are now and how the last run went",
		Long: `Show for every recorded volume whether it is mounted, open, locked or missing now,
what its LUKS header and key record say, and what is wrong; and how the last run of
this boot went. Neither KMS nor IMDS is asked, no key is read, and nothing waits for
a run that is under way. The exit code is 0 where the status could be told, good or
bad: programs read .well of --json. With --watch, --json prints a line each time.`,
		Example: `  sudo luks-kms-agent status
  sudo luks-kms-agent status --watch --interval 5s
  sudo luks-kms-agent status --json | jq -e .well
  sudo luks-kms-agent status --json |
    jq -r '.volumes[] | [.state, .mount_point] | @tsv'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("interval") && !again {
				return &usageError{errors.New("--interval goes with --watch")}
			}
			if interval < 100*time.Millisecond {
				return &usageError{fmt.Errorf("--interval %s is shorter than 100ms", interval)}
			}
			if os.Geteuid() != 0 {
				return fmt.Errorf("cannot read records and LUKS headers: %w", unix.EPERM)
			}
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			look := func() (string, error) { return lookAt(cmd.Context(), node, screenOf(out), asJSON, again) }
			if again {
				return watch(cmd.Context(), out, cmd.ErrOrStderr(), interval, look)
			}
			text, err := look()
			if err != nil {
				return err
			}
			_, err = io.WriteString(out, text)
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVarP(&again, "watch", "w", false, "show it again and again until interrupted")
	cmd.Flags().DurationVar(&interval, "interval", interval, "how long --watch waits between two looks")
	return cmd
}

// lookAt is what status prints, once or as one look of many.
func lookAt(ctx context.Context, node *agent.Node, on screen, asJSON, again bool) (string, error) {
	status, err := node.Status(ctx)
	if err != nil {
		return "", err
	}
	if asJSON {
		var b strings.Builder
		if again {
			err = json.NewEncoder(&b).Encode(status)
		} else {
			err = printJSON(&b, status)
		}
		return b.String(), err
	}
	text := on.status(status, time.Now())
	if again {
		text = on.redraw(text)
	}
	return text, nil
}

// watch looks again and again until ctx ends, which is how a person ends it and no error. The first look has to go well; one that fails
// later may be of a moment at which disks come and go.
func watch(ctx context.Context, out, errs io.Writer, interval time.Duration, look func() (string, error)) error {
	if screenOf(out).terminal {
		const hideCursor, showCursor = "\x1b[?25l", "\x1b[?25h"
		fmt.Fprint(out, hideCursor)
		defer fmt.Fprint(out, showCursor)
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for first := true; ; first = false {
		text, err := look()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && first:
			return err
		case err != nil:
			printOne(errs, err)
		default:
			if _, err := io.WriteString(out, text); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// redraw makes text take the place of all that a terminal shows. What does not fit is counted.
func (s screen) redraw(text string) string {
	if !s.terminal {
		return text + "\n"
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if fit := s.height - 2; s.height > 2 && len(lines) > fit+1 {
		lines = append(lines[:fit], fmt.Sprintf("… %d more lines", len(lines)-fit))
	}
	const home, clear = "\x1b[H", "\x1b[2J"
	return home + clear + strings.Join(lines, "\n") + "\n"
}

// status is the screen of one status, as of now.
func (s screen) status(status agent.Status, now time.Time) string {
	var b strings.Builder
	say := func(line string) { b.WriteString(line + "\n") }
	volumes, left := shown(status.Volumes)
	verdict, color := "Not all well:", red
	if status.Well != nil && *status.Well {
		verdict, color = "All well:", green
	}
	say(s.paint(color, verdict) + s.fill(verdict+" ", overview(status, volumes))[len(verdict):])
	say(s.fill("", lastRun(status, now)))
	for _, p := range status.Problems {
		say(s.problem("  ! ", p))
	}
	if n := status.Quarantined; n > 0 {
		say(counted(n, "volume record of another instance is", "volume records of other instances are") + " in quarantine.")
	}
	if l := status.Logs; l != nil {
		say(s.fill("Logs: ", punctuate(logsDetails(*l, now), ",")))
	}
	if len(volumes) > 0 {
		common := commonDetails(volumes, now)
		if common != nil {
			say(s.fill("Each: ", punctuate(common, ";")))
		}
		say("")
		if table, ok := s.table(volumes, common != nil, now); ok {
			b.WriteString(table)
		} else {
			for _, v := range volumes {
				say(s.block(v, common != nil, now))
			}
		}
	}
	if left > 0 {
		say(fmt.Sprintf("\n%s left alone; `luks-kms-agent plan` says why.", counted(left, "disk is", "disks are")))
	}
	return b.String()
}

func logsDetails(l agent.LogsStatus, now time.Time) []string {
	d := []string{"never all sent"}
	if l.LastSuccess != nil {
		d = []string{"all sent " + age(now.Sub(*l.LastSuccess)) + " ago"}
	}
	if l.Waiting > 0 {
		d = append(d, size(l.Waiting)+" waiting")
	}
	if l.Losses > 0 {
		d = append(d, "something lost "+counted(l.Losses, "time", "times"))
	}
	return d
}

// shown are the volumes that a person wants to see, by mount point, and how many disks were left alone.
func shown(all []agent.VolumeStatus) (volumes []agent.VolumeStatus, left int) {
	for _, v := range all {
		switch {
		case v.State != "" || len(v.Problems) > 0:
			volumes = append(volumes, v)
		case v.Action == string(agent.Leave):
			left++
		}
	}
	slices.SortStableFunc(volumes, func(a, b agent.VolumeStatus) int {
		// A name without a number, or with a shorter one, comes first: /mnt, /mnt2, /mnt10.
		if n := len(a.MountPoint) - len(b.MountPoint); n != 0 && a.MountPoint != "" && b.MountPoint != "" {
			return n
		}
		switch {
		case a.MountPoint == b.MountPoint:
			return 0
		case b.MountPoint == "":
			return -1
		case a.MountPoint == "":
			return 1
		}
		return strings.Compare(a.MountPoint, b.MountPoint)
	})
	return volumes, left
}

// state is how a volume is in a word. A volume that is not what it should be because a run could not help it says so.
func state(v agent.VolumeStatus) (string, style) {
	switch {
	case v.State == "mounted":
		return v.State, green
	case v.State == "missing":
		return v.State, red
	case v.Error != "" && v.Action == string(agent.Refuse):
		return "refused", red
	case v.Error != "":
		return "failed", red
	}
	return v.State, yellow
}

// overview counts the volumes by state, and what is wrong.
func overview(status agent.Status, volumes []agent.VolumeStatus) []string {
	counts := map[string]int{}
	problems := len(status.Problems)
	for _, v := range volumes {
		word, _ := state(v)
		counts[word]++
		problems += len(v.Problems)
	}
	var parts []string
	for _, word := range []string{"missing", "refused", "failed", "locked", "open", "mounted"} {
		switch counts[word] {
		case 0:
		case len(volumes):
			parts = []string{counted(len(volumes), "volume", "volumes") + " " + word}
		default:
			parts = append(parts, fmt.Sprintf("%d %s", counts[word], word))
		}
	}
	switch {
	case len(volumes) == 0:
		parts = []string{"no volumes"}
	case len(parts) > 1:
		parts[0] = fmt.Sprintf("%d volumes: %s", len(volumes), parts[0])
	}
	if problems > 0 {
		parts = append(parts, counted(problems, "problem", "problems"))
	}
	return punctuate(parts, ",")
}

// punctuate puts a mark behind all items but the last.
func punctuate(items []string, mark string) []string {
	out := slices.Clone(items)
	for i := range len(out) - 1 {
		out[i] += mark
	}
	return out
}

func lastRun(status agent.Status, now time.Time) []string {
	if status.Result == "none" {
		return []string{"Nothing has run since the boot."}
	}
	var calls []string
	k := status.KMS
	for _, c := range []struct {
		n    int
		name string
	}{{k.GenerateDataKey, "GenerateDataKey"}, {k.Decrypt, "Decrypt"}, {k.DescribeKey, "DescribeKey"}, {k.ReEncrypt, "ReEncrypt"}} {
		if c.n > 0 {
			calls = append(calls, fmt.Sprintf("%d %s", c.n, c.name))
		}
	}
	if len(calls) == 0 {
		calls = []string{"no calls"}
	}
	if k.Retries > 0 {
		calls = append(calls, counted(k.Retries, "retry", "retries"))
	}
	calls[0] = "KMS: " + calls[0]
	return append([]string{
		fmt.Sprintf("Last run: %s,", status.Result),
		fmt.Sprintf("%s (%s ago),", status.Finished.UTC().Format("2006-01-02 15:04:05 UTC"), age(now.Sub(status.Finished))),
		fmt.Sprintf("took %.1f s;", status.Finished.Sub(status.Started).Seconds()),
	}, punctuate(calls, ",")...)
}

// commonDetails are those of every volume, nil where they are not the same.
func commonDetails(volumes []agent.VolumeStatus, now time.Time) []string {
	first := details(volumes[0], now)
	differs := func(v agent.VolumeStatus) bool { return !slices.Equal(details(v, now), first) }
	if len(volumes) < 2 || len(first) == 0 || slices.ContainsFunc(volumes, differs) {
		return nil
	}
	return first
}

// block is one volume on a narrow screen; brief leaves out its details.
func (s screen) block(v agent.VolumeStatus, brief bool, now time.Time) string {
	word, color := state(v)
	first := []string{dash(v.MountPoint)}
	if u := usage(v); u != "" {
		first = append(first, v.Filesystem, u+" used")
	} else if v.Filesystem != "" {
		first = append(first, v.Filesystem)
	}
	lines := []string{s.paint(color, fmt.Sprintf("%-*s", len(blockIndent), word)) + clean(strings.Join(first, gap))}
	facts := []string{clean(strings.TrimSpace(v.Class + " " + v.Identity)), size(v.Size)}
	if v.Device != "" {
		facts = append(facts, v.Device)
	}
	if v.Mapping != "" {
		facts = append(facts, shortMapping(v.Mapping))
	}
	lines = append(lines, s.fill("  ", punctuate(facts, ",")))
	if d := details(v, now); len(d) > 0 && !brief {
		lines = append(lines, s.paint(dim, s.fill("  ", punctuate(d, ";"))))
	}
	for _, p := range v.Problems {
		lines = append(lines, s.problem("  ! ", p))
	}
	return strings.Join(lines, "\n")
}

// table is all volumes on a wide screen, a row for each; what does not fit into columns is below it. Not ok where not even the columns
// fit. brief leaves out the details.
func (s screen) table(volumes []agent.VolumeStatus, brief bool, now time.Time) (text string, ok bool) {
	if s.width < wide {
		return "", false
	}
	rows := [][]string{{"STATE", "MOUNT", "FS", "USED", "DEVICE", "CLASS", "IDENTITY", "SIZE", "MAPPING"}}
	for _, v := range volumes {
		word, _ := state(v)
		rows = append(rows, []string{word, dash(v.MountPoint), dash(v.Filesystem), dash(usage(v)), dash(v.Device), dash(v.Class), dash(v.Identity),
			size(v.Size), dash(shortMapping(v.Mapping))})
	}
	lines, longest, indent := align(rows)
	mappings := longest <= s.width
	if !mappings {
		for i := range rows {
			rows[i] = rows[i][:len(rows[i])-1]
		}
		if lines, longest, indent = align(rows); longest > s.width {
			return "", false
		}
	}
	var b strings.Builder
	b.WriteString(s.paint(bold, lines[0]) + "\n")
	for i, v := range volumes {
		word, color := state(v)
		b.WriteString(s.paint(color, word) + strings.TrimPrefix(lines[i+1], word) + "\n")
		var d []string
		if !mappings && v.Mapping != "" {
			d = append(d, shortMapping(v.Mapping))
		}
		if !brief {
			d = append(d, details(v, now)...)
		}
		if len(d) > 0 {
			b.WriteString(s.paint(dim, s.fill(indent, punctuate(d, ";"))) + "\n")
		}
		for _, p := range v.Problems {
			b.WriteString(s.problem(indent+"! ", p) + "\n")
		}
	}
	return b.String(), true
}

func (s screen) problem(first, text string) string { return s.paint(red, s.wrap(first, text)) }

// details are the facts of a volume that are looked at less often.
func details(v agent.VolumeStatus, now time.Time) []string {
	var d []string
	if v.KeyARN != "" {
		text := fmt.Sprintf("key %s, %s old", shortARN(v.KeyARN), age(now.Sub(v.KeyCreated)))
		if v.RewrapPending {
			text += ", rewrap pending"
		}
		d = append(d, text)
	}
	if v.RecoveryKey != nil {
		d = append(d, map[bool]string{true: "recovery key", false: "no recovery key"}[*v.RecoveryKey])
	}
	if v.OtherKeySlots != nil && *v.OtherKeySlots > 0 {
		d = append(d, counted(*v.OtherKeySlots, "other key slot", "other key slots"))
	}
	if !v.LastUnlock.IsZero() {
		d = append(d, fmt.Sprintf("unlocked %s ago", age(now.Sub(v.LastUnlock))))
	}
	if !v.HeaderBackup.IsZero() {
		backup := fmt.Sprintf("header backup %s old", age(now.Sub(v.HeaderBackup)))
		if v.BackupStale {
			backup += ", of another header"
		}
		d = append(d, backup)
	}
	switch {
	case v.Escrow.IsZero() && v.EscrowPending:
		d = append(d, "not in the escrow yet")
	case v.EscrowPending:
		d = append(d, fmt.Sprintf("escrowed %s ago, and changed since", age(now.Sub(v.Escrow))))
	case !v.Escrow.IsZero():
		d = append(d, fmt.Sprintf("escrowed %s ago", age(now.Sub(v.Escrow))))
	}
	return d
}

// usage says how full a mounted filesystem is, "" where that is not known.
func usage(v agent.VolumeStatus) string {
	if v.FilesystemSize == 0 {
		return ""
	}
	unit := unitOf(v.FilesystemSize)
	return fmt.Sprintf("%.1f/%.1f %s %d%%", float64(v.FilesystemUsed)/unit.bytes, float64(v.FilesystemSize)/unit.bytes, unit.name,
		100*v.FilesystemUsed/v.FilesystemSize)
}

// shortMapping keeps of luks-<uuid> what tells volumes apart.
func shortMapping(name string) string {
	if first, _, ok := strings.Cut(strings.TrimPrefix(name, "luks-"), "-"); ok && strings.HasPrefix(name, "luks-") {
		return "luks-" + first + "…"
	}
	return name
}

// shortARN keeps of arn:PARTITION:kms:REGION:ACCOUNT:key/ID the region and the beginning of the id.
func shortARN(arn string) string {
	parts := strings.SplitN(arn, ":", 6)
	id, ok := strings.CutPrefix(parts[len(parts)-1], "key/")
	if len(parts) < 6 || !ok {
		return arn
	}
	const kept = len("mrk-") + 8
	if !strings.HasPrefix(id, "mrk-") {
		id, _, _ = strings.Cut(id, "-")
	}
	if utf8.RuneCountInString(id) > kept {
		id = id[:kept]
	}
	return parts[3] + "/" + id + "…"
}

// age says a duration in its largest unit.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "0 s" // the clock was set back
	case d < time.Minute:
		return fmt.Sprintf("%.0f s", d.Truncate(time.Second).Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d d", d/(24*time.Hour))
}

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
