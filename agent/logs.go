package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/logs"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
)

// ErrNoLogs says that the configuration archives no logs.
var ErrNoLogs = errors.New("cannot archive logs: the configuration names none")

// LogsArchived is what ArchiveLogs did.
type LogsArchived struct {
	Pieces  int // that were sent and confirmed
	Lines   int // in them
	Bytes   int64
	Waiting int64 // bytes that wait in the spool
	Full    bool  // the spool is full: what is new stays where it is
	// Lost is what could not be collected since the last call that told of it.
	Lost []logs.Lost
}

// ArchiveLogs sends what is new in the logs to S3, in pieces, each confirmed by what S3 tells of it. A piece that is not confirmed waits in the spool. It may
// be killed at any point: nothing is lost or sent twice by that.
func (n *Node) ArchiveLogs(ctx context.Context) (LogsArchived, error) {
	return n.archiveLogs(ctx, piecesAtOnce)
}

func (n *Node) archiveLogs(ctx context.Context, atOnce int) (done LogsArchived, err error) {
	l := n.cfg.Logs
	if l.Bucket == "" {
		return done, ErrNoLogs
	}
	spool, err := logs.Open(logs.Options{Dir: l.Spool, Files: l.Files, Units: l.Units, MaxSpool: l.MaxSpool << 20, Rate: l.Rate << 20})
	if err != nil {
		return done, err
	}
	defer func() {
		if err == nil {
			err = spool.Succeeded()
		}
		sum := spool.Summary()
		spool.Close()
		done.Waiting = sum.Waiting
		n.tellLogMetrics(sum, err == nil)
	}()
	var errs []error
	var prefix string
	v, err := n.vault(ctx, l.options())
	if err == nil {
		prefix, err = n.logPrefix(ctx)
	}
	if err != nil {
		errs = append(errs, err) // what is new is collected all the same, as far as there is room
	}
	send := func() {
		if err == nil && ctx.Err() == nil {
			if err = n.sendPieces(ctx, v, prefix, spool, atOnce, &done); err != nil {
				errs = append(errs, err)
			}
		}
	}
	send()
	// Once, unless the spool was too small for all: whoever writes on is not waited for.
	for again := true; again && ctx.Err() == nil; {
		c, cerr := spool.Collect(ctx)
		errs = append(errs, cerr)
		send()
		done.Full = c.Full && err != nil
		again = c.Full && err == nil
	}
	done.Lost, err = spool.TellLost()
	for _, lost := range done.Lost {
		n.log.Warn("log lines are lost", zap.String("source", lost.Source), zap.Int64("bytes", lost.Bytes), zap.String("reason", lost.Reason))
	}
	return done, errors.Join(append(errs, err, ctx.Err())...)
}

// LogsStatus is how the archive of logs is doing, as the status has it.
type LogsStatus struct {
	Waiting     int64      `json:"waiting"`                // bytes that wait in the spool
	LastSuccess *time.Time `json:"last_success,omitempty"` // when last all there was had been sent
	Losses      int        `json:"losses,omitempty"`       // how many times a source lost something, since the spool was made
}

// logsStatus is nil where nothing was ever sent.
func (n *Node) logsStatus() (*LogsStatus, error) {
	if n.cfg.Logs.Bucket == "" {
		return nil, nil
	}
	sum, err := logs.ReadSummary(n.cfg.Logs.Spool)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s := &LogsStatus{Waiting: sum.Waiting, Losses: sum.Losses}
	if !sum.Success.IsZero() {
		s.LastSuccess = &sum.Success
	}
	return s, nil
}

// logPrefix is what the names of this node's logs begin with, as Amazon EMR has them: CLUSTER/node/INSTANCE-ID/.
func (n *Node) logPrefix(ctx context.Context) (string, error) {
	id, err := n.cloud.Identity(ctx)
	if err != nil {
		return "", err
	}
	return n.cfg.Logs.Prefix + n.cfg.Logs.Cluster + "/node/" + id.InstanceID + "/", nil
}

// Pieces are sent several at a time, the oldest first, but no more of them than the memory for one that nothing makes smaller.
const (
	piecesAtOnce = 4
	pieceMemory  = 8 << 20 // bytes
)

// sendPieces sends what waits until one is not confirmed. Those that were sent beside it count all the same.
func (n *Node) sendPieces(ctx context.Context, v vault, prefix string, spool *logs.Spool, atOnce int, done *LogsArchived) error {
	type sending struct {
		logs.Piece
		err error
	}
	for waiting := spool.Pieces(); len(waiting) > 0; {
		var next []sending
		size := int64(0)
		for _, p := range waiting {
			if size += p.Size; len(next) == atOnce || len(next) > 0 && size > pieceMemory {
				break
			}
			next = append(next, sending{Piece: p})
		}
		waiting = waiting[len(next):]
		n.step("Sending %s", next[0].Name)
		systemd.ExtendTimeout(2 * escrowTimeout)
		eachOf(next, atOnce, func(p *sending) { p.err = sendPiece(ctx, v, prefix, spool, p.Piece) })
		var failed error
		for _, p := range next {
			if p.err != nil {
				failed = cmp.Or(failed, p.err) // the others say the same
				continue
			}
			if err := spool.Done(p.Piece); err != nil {
				return err
			}
			done.Pieces++
			done.Lines += p.Lines
			done.Bytes += p.Bytes
		}
		if failed != nil {
			return failed
		}
	}
	return nil
}

func sendPiece(ctx context.Context, v vault, prefix string, spool *logs.Spool, p logs.Piece) error {
	f, err := spool.OpenPiece(p)
	if err != nil {
		return fmt.Errorf("cannot send %s: %w", p.Name, err)
	}
	data := make([]byte, p.Size) // it is all that is held in memory, and does not have to grow
	_, err = io.ReadFull(f, data)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cannot send %s: %w", p.Name, err)
	}
	_, err = v.Put(ctx, prefix+p.Name, data, map[string]string{"lines": fmt.Sprint(p.Lines)})
	return err
}

// LogObject is an object of the archive, as S3 tells of it.
type LogObject struct {
	archive.Object
	URL string
	Err error // why it does not count: it is not encrypted as it has to be, or S3 does not tell
}

// VerifyLogs reads the encryption properties of this node's logs in the archive back, or of those of all nodes of the cluster.
func (n *Node) VerifyLogs(ctx context.Context, allNodes bool) ([]LogObject, error) {
	if n.cfg.Logs.Bucket == "" {
		return nil, ErrNoLogs
	}
	v, err := n.vault(ctx, n.cfg.Logs.options())
	if err != nil {
		return nil, err
	}
	prefix := n.cfg.Logs.Prefix + n.cfg.Logs.Cluster + "/node/"
	if !allNodes {
		if prefix, err = n.logPrefix(ctx); err != nil {
			return nil, err
		}
	}
	listed, err := v.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	found := make([]LogObject, len(listed))
	for i, o := range listed {
		found[i] = LogObject{Object: o, URL: v.URL(o.Name)}
	}
	eachOf(found, headsAtOnce, func(o *LogObject) { o.Object, o.Err = properties(ctx, v, o.Object) })
	return found, nil
}
