//go:build vm

package vm_test

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// trouble is one way in which AWS, or the way to it, fails a node, and what must come of it.
type trouble struct {
	what            string
	kms             []proxy.Fault   // of the stage's operation where Ops says nothing
	imds            proxy.IMDSState // all the time
	key             string          // instead of the node's
	endpoint        string          // instead of KMSEndpoint
	setup, teardown string          // in the guest
	begin, end      func()          // on the host
	limit, timeout  time.Duration   // what is configured; 0 is the default, 10 minutes and 10 seconds
	op              string          // whose attempts are counted, instead of the stage's
	code            int
	says            []string // in what it prints
	keys            int      // key records that a first boot leaves
}

// retried says whether the agent has to try again: it does on what may pass, and only then.
func (t trouble) retried() bool { return t.code == 5 }

// stage is a time in the life of a volume.
type stage struct {
	t       *testing.T
	n       *harness.Node
	command string       // of the agent: run or unlock
	disk    harness.Disk // the only one that the agent may touch
	number  int          // of the mount point and state directory
	op      string       // the call of KMS that fails
	slack   time.Duration
	locked  string // at unlock: records and mappings of the locked volume
}

// networkDisks are loop devices, which are quick to read, but for the one that gets data: it is as the others of EC2.
var networkDisks = []harness.Disk{
	harness.Loop("loop0", "/dev/loop0"), harness.Loop("loop1", "/dev/loop1"), harness.Loop("loop2", "/dev/loop2"), ebs1,
}

func (s *stage) stateDir() string { return fmt.Sprintf("/srv/state%d", s.number) }
func (s *stage) point() string    { return fmt.Sprintf("/mnt%d", s.number) }

// named is the configuration of the volumes of some disks, at the mount points of their stages.
func named(disks ...harness.Disk) string {
	var b strings.Builder
	b.WriteString("volumes:\n")
	for _, d := range disks {
		fmt.Fprintf(&b, "  - name: %s\n    mount_point: /mnt%d\n", cmp.Or(d.Loop, d.Serial), slices.Index(networkDisks, d)+1)
	}
	return b.String()
}

// config lets the agent see one disk, with records of its own.
func (s *stage) config(tr trouble) string {
	var more strings.Builder
	fmt.Fprintf(&more, "filesystem: ext4\nstate_dir: %s\n%s", s.stateDir(), named(s.disk))
	if s.disk.Loop != "" {
		fmt.Fprintf(&more, "exclude: [%s]\n", ebs1.Serial)
	}
	if tr.limit > 0 {
		fmt.Fprintf(&more, "retry_limit: %s\n", tr.limit)
	}
	if tr.timeout > 0 {
		fmt.Fprintf(&more, "call_timeout: %s\n", tr.timeout)
	}
	config := s.n.ConfigFor(cmp.Or(tr.key, s.n.Key), more.String())
	return strings.Replace(config, harness.KMSEndpoint, cmp.Or(tr.endpoint, harness.KMSEndpoint), 1)
}

// agent runs the agent once: what it said, how long it took by the guest's own clock, and the records, mappings and
// mounts that are there afterwards. Under emulation each process costs, so what bash can do bash does.
func (s *stage) agent(tr trouble, command string) (r harness.Result, took time.Duration, left string) {
	s.t.Helper()
	script := fmt.Sprintf(`umask 077; echo "$(</dev/stdin)" >/root/network.yaml; set -e; { %s
} >&2; set +e
read -r begin _ </proc/uptime
luks-kms-agent --config /root/network.yaml %s; code=$?
read -r end _ </proc/uptime
set -e; { %s
} >&2
echo "== $begin $end"
shopt -s nullglob; cd %s 2>/dev/null || cd /root
records=(keys/* volumes/*); [ ${#records[@]} = 0 ] || sha256sum "${records[@]}"
echo /dev/mapper/luks-*; while read -r what where _; do case $what in /dev/mapper/*) echo "$what $where";; esac; done </proc/mounts
exit $code`, cmp.Or(tr.setup, ":"), command, cmp.Or(tr.teardown, ":"), s.stateDir())
	r = s.n.TryWith([]byte(s.config(tr)), script)
	r.Command = tr.what + ": " + command
	before, after, ok := strings.Cut(r.Stdout, "== ")
	times, left, _ := strings.Cut(after, "\n")
	var begin, end float64
	if _, err := fmt.Sscan(times, &begin, &end); err != nil || !ok {
		s.t.Fatalf("the script did not come to its end: %s", r)
	}
	r.Stdout = before
	return r, time.Duration((end - begin) * float64(time.Second)), left
}

// bad makes AWS as the trouble says.
func (s *stage) bad(tr trouble) {
	faults := slices.Clone(tr.kms)
	for i := range faults {
		if len(faults[i].Ops) == 0 {
			faults[i].Ops = []string{s.op}
		}
	}
	s.n.KMS.Inject(faults...)
	s.n.IMDS.Set(tr.imds)
	if tr.begin != nil {
		tr.begin()
	}
	s.n.KMS.Forget()
	s.n.IMDS.Forget()
}

// well makes AWS well again.
func (s *stage) well(tr trouble) {
	s.n.KMS.Inject()
	s.n.IMDS.Set(proxy.Well)
	if tr.end != nil {
		tr.end()
	}
}

// meet lets the agent meet one trouble, and looks at what became of it.
func (s *stage) meet(tr trouble) {
	s.t.Helper()
	// A busy machine may need the whole of a brief retry_limit for the first attempt.
	for !s.met(tr) {
		tr.limit *= 4
	}
}

// met is one go at meet; it returns false where there was no time for a second attempt, if one was to be made.
func (s *stage) met(tr trouble) bool {
	s.t.Helper()
	disks, connections := s.n.Digests(0), s.n.TLSConnections()
	s.bad(tr)
	r, took, left := s.agent(tr, s.command)
	calls, requests := s.n.KMS.Calls(), s.n.IMDS.Requests()
	s.well(tr)

	wantRefusal(s.t, r, tr.code, tr.says...)
	if changed := harness.ChangedDisks(disks, s.n.Digests(0)); len(changed) > 0 {
		s.t.Errorf("%s: disks were written to: %v", tr.what, changed)
	}
	s.wantLeft(tr, left)

	// Every attempt is one that somebody saw, and every wait one that was told.
	op := cmp.Or(tr.op, s.op)
	waits, attempts := len(waitsFor(op, r)), 0
	switch {
	case tr.imds != proxy.Well && tr.imds != proxy.Expired:
		attempts = min(len(requests), waits+1) // some ask several times
	case tr.endpoint == harness.KMSTLSEndpoint:
		attempts = min(s.n.TLSConnections()-connections, waits+1) // DescribeKey tries too
	case tr.endpoint != "":
		attempts = waits + 1 // nobody is there to count
	default:
		for _, c := range calls {
			if c.Op == op {
				attempts++
			}
		}
	}
	if tr.retried() && r.Code == 5 && waits == 0 && tr.limit < 10*time.Second {
		return false
	}
	// An attempt that ran out of time may not have come as far as the proxy.
	if attempts > waits+1 || attempts < waits+1 && tr.timeout != time.Second || (waits > 0) != tr.retried() {
		s.t.Errorf("%s: %d attempts, %d waits: %s\n%v %v", tr.what, attempts, waits, r, calls, requests)
	}
	if bound := tr.limit + tr.timeout + s.slack; tr.retried() && took > bound {
		s.t.Errorf("%s: it took %v, more than %v", tr.what, took, bound)
	}
	if tr.retried() && slices.ContainsFunc(tr.says, func(word string) bool { return strings.Contains(word, "credentials") }) {
		fetched := 0
		for _, request := range requests {
			if strings.HasSuffix(request, "/iam/security-credentials/node") {
				fetched++
			}
		}
		if fetched < attempts {
			s.t.Errorf("%s: the role's credentials were fetched %d times in %d attempts", tr.what, fetched, attempts)
		}
	}
	return true
}

// wantLeft looks at records, mappings and mounts after a trouble.
func (s *stage) wantLeft(tr trouble, left string) {
	s.t.Helper()
	if s.command == "unlock" {
		if left != s.locked {
			s.t.Errorf("%s: records, mappings or mounts changed:\n%s\n%s", tr.what, s.locked, left)
		}
	} else if strings.Contains(left, "luks-") || strings.Contains(left, "volumes/") || strings.Count(left, "keys/") != tr.keys {
		s.t.Errorf("%s: want %d key records and nothing else:\n%s", tr.what, tr.keys, left)
	}
}

// waitsFor returns what a run said of each wait for a call.
func waitsFor(op string, r harness.Result) []string {
	var lines []string
	for line := range strings.Lines(r.Stderr) {
		if strings.Contains(line, "waiting for AWS") && strings.Contains(line, `"call": "`+op+`"`) {
			lines = append(lines, line)
		}
	}
	return lines
}

// chain lets one run meet several troubles of KMS that pass, each once, and then the last one for good; if that is none, all
// is well, and nobody had to do anything.
func (s *stage) chain(troubles []trouble, last trouble) {
	s.t.Helper()
	for few := range slices.Chunk(troubles, 5) { // waits double
		tr := last
		tr.kms = nil
		for _, t := range few {
			tr.what += ", after " + t.what
			tr.kms = append(tr.kms, t.kms...)
			tr.kms[len(tr.kms)-1].Times = 1
			tr.timeout = max(2*time.Second, tr.timeout, t.timeout)
		}
		tr.kms = append(tr.kms, last.kms...)
		disks := s.n.Digests(0)
		s.bad(tr)
		r, _, left := s.agent(tr, s.command)
		calls := s.n.KMS.Calls()
		s.well(tr)
		wantRefusal(s.t, r, last.code, last.says...)
		waits := waitsFor(s.op, r)
		if attempts := strings.Count(fmt.Sprint(calls), s.op+" "); attempts != len(few)+1 || len(waits) != len(few) {
			s.t.Errorf("%d attempts, %d waits: %s\n%v", attempts, len(waits), r, calls)
		}
		for i, line := range waits {
			if i < len(few) && !strings.Contains(line, few[i].says[0]) {
				s.t.Errorf("%s, wait %d: want %q in %s", tr.what, i+1, few[i].says[0], line)
			}
		}
		if last.code != 0 {
			wantUntouched(s.t, s.n, disks)
			s.wantLeft(last, left)
			continue
		}
		if !strings.Contains(left, s.point()+"\n") {
			s.t.Errorf("%s: nothing is mounted: %s%s", tr.what, r, left)
		}
		s.lock()
	}
}

// unlock opens the volume at the first attempt, and locks it.
func (s *stage) unlock(tr trouble) {
	s.t.Helper()
	s.bad(tr)
	r, _, left := s.agent(tr, "unlock")
	calls := s.n.KMS.Calls()
	s.well(tr)
	if r.Code != 0 || !strings.Contains(left, s.point()+"\n") || len(calls) != 1 || calls[0].Code != "" {
		s.t.Errorf("%s%s%v", r, left, calls)
	}
	s.lock()
}

func (s *stage) lock() {
	s.t.Helper()
	r, _, left := s.agent(trouble{what: "lock"}, "lock")
	if r.Code != 0 || strings.Contains(left, s.point()) {
		s.t.Fatalf("%s%s", r, left)
	}
	s.locked = left
}

// format shows that the first boot goes on once the trouble has ended, and locks the volume.
func (s *stage) format(tr trouble) {
	s.t.Helper()
	tr.what = "all is well again" + tr.what
	s.bad(tr)
	if tr.imds != proxy.Well { // it is late
		late := time.AfterFunc(4*time.Second, func() { s.n.IMDS.Set(proxy.Well) })
		defer late.Stop()
	}
	r, _, left := s.agent(tr, "run")
	s.well(tr)
	if r.Code != 0 || !strings.Contains(left, s.point()+"\n") || strings.Count(left, "keys/") != 1 || strings.Count(left, "volumes/") != 1 {
		s.t.Fatalf("%s%s", r, left)
	}
	writeFiles(s.n, s.point())
	s.lock()
}

// refuse is the fault of an exception of KMS.
func refuse(status int, code string) []proxy.Fault {
	return []proxy.Fault{{Kind: proxy.Refuse, Status: status, Code: code}}
}

// forge is the fault of an answer that differs from the true one in one field.
func forge(field string, value any) []proxy.Fault {
	return []proxy.Fault{{Kind: proxy.Forge, Edit: func(answer map[string]any) { answer[field] = value }}}
}

// otherARN is the ARN of another key in the node's account and region.
func otherARN(n *harness.Node) string {
	return n.Key[:strings.LastIndex(n.Key, "/")] + "/00000000-0000-4000-8000-000000000000"
}

// otherKey is a data key in place of the true one, or a wrapped key that is none.
func otherKey(size int) string {
	return base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", size)))
}

const (
	brief   = time.Second     // retry_limit of what lasts
	patient = 5 * time.Second // call_timeout where answers are quick, also on a busy machine
)

// passing are troubles of any call of KMS that may pass.
func passing() []trouble {
	const quota, health, credentials, route = "quota", "AWS Health", "does not accept the role's credentials", "route, DNS and security groups"
	troubles := []trouble{
		{what: "throttled", kms: refuse(400, "ThrottlingException"), says: []string{"ThrottlingException", quota}},
		{what: "limit exceeded", kms: refuse(400, "LimitExceededException"), says: []string{"LimitExceededException", quota}},
		{what: "internal error", kms: refuse(500, "KMSInternalException"), says: []string{"KMSInternalException", health}},
		{what: "503", kms: refuse(503, "ServiceUnavailableException"), says: []string{"ServiceUnavailableException", health}},
		{what: "503 of a load balancer", kms: []proxy.Fault{{Kind: proxy.Babble, Status: 503}}, says: []string{"503 Service Unavailable", route}},
		{what: "dependency timeout", kms: refuse(503, "DependencyTimeoutException"), says: []string{"DependencyTimeoutException", health}},
		{what: "key unavailable", kms: refuse(500, "KeyUnavailableException"), says: []string{"KeyUnavailableException", "custom key store"}},
		{what: "request expired", kms: refuse(400, "RequestExpired"), says: []string{"RequestExpired", "Set the node's clock"}},
		{what: "expired token", kms: refuse(400, "ExpiredTokenException"), says: []string{"ExpiredTokenException", credentials}},
		{what: "unknown credentials", kms: refuse(400, "UnrecognizedClientException"), says: []string{"UnrecognizedClientException", credentials}},
		{what: "bad signature", kms: refuse(400, "InvalidSignatureException"), says: []string{"InvalidSignatureException", credentials}},
		{what: "dropped", kms: []proxy.Fault{{Kind: proxy.Drop}}, says: []string{"EOF", route}},
		{what: "broken answer", kms: []proxy.Fault{{Kind: proxy.Break}}, says: []string{"cannot be understood", route}},
		{what: "a page in place of an answer", kms: []proxy.Fault{{Kind: proxy.Babble, Status: 200}}, says: []string{"cannot be understood", route}},
		{what: "hangs", kms: []proxy.Fault{{Kind: proxy.Hang}}, limit: 2 * time.Second, timeout: time.Second, says: []string{"deadline exceeded while", route}},
		{what: "too slow", kms: []proxy.Fault{{Kind: proxy.Slow, Delay: 3 * time.Second}}, limit: 2 * time.Second, timeout: time.Second, says: []string{"deadline exceeded while", route}},
	}
	for i := range troubles {
		tr := &troubles[i]
		tr.code, tr.limit, tr.timeout = 5, cmp.Or(tr.limit, brief), cmp.Or(tr.timeout, patient)
		tr.says = append(tr.says, "The service tries again by itself.")
	}
	return troubles
}

// pick returns the troubles of those names, and the others. A process in the guest has its price, and a first boot's looks
// through a disk: Decrypt of a volume with data meets every trouble alone, the other calls meet most in chains.
func pick(troubles []trouble, names ...string) (picked, others []trouble) {
	for _, tr := range troubles {
		if slices.Contains(names, tr.what) {
			picked = append(picked, tr)
		} else {
			others = append(others, tr)
		}
	}
	return picked, others
}

// final are troubles of any call of KMS that a person has to end. They are met with the default limits: a retry would
// take ten minutes.
func final() []trouble {
	troubles := []trouble{
		{what: "denied", kms: []proxy.Fault{{Kind: proxy.Deny}}, says: []string{"AccessDeniedException", "Allow kms:"}},
		{what: "no such key", kms: refuse(400, "NotFoundException"), says: []string{"NotFoundException", "Check kms_key and region"}},
		{what: "disabled", kms: refuse(400, "DisabledException"), says: []string{"DisabledException", "Enable the key"}},
		{what: "invalid state", kms: refuse(400, "KMSInvalidStateException"), says: []string{"KMSInvalidStateException", "cancel its deletion"}},
		{what: "invalid usage", kms: refuse(400, "InvalidKeyUsageException"), says: []string{"InvalidKeyUsageException", "symmetric key"}},
		{what: "404 of another server", kms: []proxy.Fault{{Kind: proxy.Babble, Status: 404}}, says: []string{"404 Not Found", "What answers is not KMS"}},
	}
	for i := range troubles {
		troubles[i].code = 4
	}
	return troubles
}

// deny ends a chain.
func deny() trouble {
	return trouble{what: "denied", kms: []proxy.Fault{{Kind: proxy.Deny}}, code: 4, says: []string{"AccessDeniedException"}}
}

// ways are troubles on the way to KMS.
func ways() []trouble {
	const resolver = "echo nameserver 169.254.169.3 >/etc/resolv.conf" // the network's; it never answers
	troubles := []trouble{
		{what: "connection refused", endpoint: "http://127.0.0.1:1", says: []string{"connection refused", "route, DNS and security groups"}},
		{what: "no route", endpoint: "https://192.0.2.1", says: []string{"network is unreachable", "route, DNS and security groups"}},
		{what: "packets vanish", endpoint: "https://192.0.2.1", setup: "ip route add 192.0.2.1 dev eth0", teardown: "ip route del 192.0.2.1",
			limit: 2 * time.Second, timeout: time.Second, says: []string{"deadline exceeded while connecting to 192.0.2.1:443", "route, DNS and security groups"}},
		{what: "no resolver", endpoint: "https://kms.invalid", says: []string{"lookup kms.invalid", "cannot be resolved"}},
		{what: "a resolver that never answers", endpoint: "https://kms.invalid", setup: resolver, teardown: "rm /etc/resolv.conf",
			limit: 2 * time.Second, timeout: time.Second, says: []string{"lookup kms.invalid", "cannot be resolved"}},
		{what: "a certificate of an unknown CA", endpoint: harness.KMSTLSEndpoint, says: []string{"x509", "not one that this node trusts"}},
	}
	for i := range troubles {
		tr := &troubles[i]
		tr.code, tr.limit, tr.timeout = 5, cmp.Or(tr.limit, brief), cmp.Or(tr.timeout, patient)
		tr.says = append(tr.says, "The service tries again by itself.")
	}
	return troubles
}

// metadata are troubles of IMDS. All may pass.
func metadata() []trouble {
	troubles := []trouble{
		{what: "no role", imds: proxy.NoRole, says: []string{"404", "Attach an instance profile"}},
		{what: "IMDS off", imds: proxy.Off, says: []string{"403", "IMDSv2 must be on"}},
		{what: "hop limit", imds: proxy.FarHop, limit: 2 * time.Second, timeout: time.Second, says: []string{"session token", "hop limit"}},
		{what: "IMDS down", imds: proxy.Down, says: []string{"IMDSv2"}},
		{what: "tokens are not accepted", imds: proxy.Forgetful, says: []string{"401", "IMDSv2"}},
		{what: "IMDS fails", imds: proxy.Failing, says: []string{"500", "IMDSv2"}},
		{what: "no tokens", imds: proxy.Busy, says: []string{"503", "session token", "IMDSv2"}},
		{what: "expired credentials", imds: proxy.Expired, says: []string{"ExpiredTokenException", "does not accept the role's credentials"}},
	}
	for i := range troubles {
		tr := &troubles[i]
		tr.code, tr.limit, tr.timeout = 5, cmp.Or(tr.limit, brief), cmp.Or(tr.timeout, patient)
		tr.says = append(tr.says, "The service tries again by itself.")
		if tr.imds != proxy.NoRole && tr.imds != proxy.Expired {
			tr.op = "Identity"
		}
	}
	return troubles
}

// badKeys are keys of KMS that make no data keys. A role without kms:DescribeKey has to find out by using them.
func badKeys(n *harness.Node) []trouble {
	id := func(arn string) string { return arn[strings.LastIndex(arn, "/")+1:] }
	symmetric := map[string]string{"KeySpec": "SYMMETRIC_DEFAULT"}
	rsa := n.CreateKey(map[string]string{"KeySpec": "RSA_2048", "KeyUsage": "ENCRYPT_DECRYPT"})
	aws, disabled, deleted := n.CreateKey(symmetric), n.CreateKey(symmetric), n.CreateKey(symmetric)
	n.KMS.ManageByAWS(id(aws))
	n.Administer("DisableKey", map[string]any{"KeyId": disabled}, nil)
	n.Administer("ScheduleKeyDeletion", map[string]any{"KeyId": deleted, "PendingWindowInDays": 7}, nil)
	blind := []proxy.Fault{{Kind: proxy.Deny, Ops: []string{"DescribeKey"}}}
	troubles := []trouble{
		{what: "unknown key", key: otherARN(n), says: []string{"NotFoundException", "Check kms_key"}},
		{what: "AWS managed key", key: aws, says: []string{"customer managed key"}},
		{what: "asymmetric key", key: rsa, says: []string{"symmetric key"}},
		{what: "asymmetric key, no DescribeKey", key: rsa, kms: blind, says: []string{"symmetric key"}},
		{what: "disabled key", key: disabled, says: []string{"Enable the key"}},
		{what: "disabled key, no DescribeKey", key: disabled, kms: blind, says: []string{"Enable the key"}},
		{what: "deleted key", key: deleted, says: []string{"cancel its deletion"}},
		{what: "deleted key, no DescribeKey", key: deleted, kms: blind, says: []string{"KMSInvalidStateException", "cancel its deletion"}},
		{what: "deleted key, no DescribeKey, as DisabledException", key: deleted, kms: blind, says: []string{"DisabledException", "cancel its deletion"},
			begin: func() { n.KMS.PendingDeletionIsDisabled(true) }, end: func() { n.KMS.PendingDeletionIsDisabled(false) }},
	}
	for i := range troubles {
		troubles[i].code = 4
	}
	return troubles
}

// TestNetworkFaults: whatever KMS, IMDS or the way to them does, what may pass is tried again within its bounds and needs
// nobody, what a person must change ends at once with the remedy, nothing is formatted or opened by a wrong answer, and the
// run afterwards is fine. All without a reboot; after it the volumes that were formatted between the faults open.
func TestNetworkFaults(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "", networkDisks...)
	blank := n.Digests(0)
	n.KMS.Inject(denied)
	n.Resume()
	if code := n.AwaitAgent(); code != "4" {
		t.Errorf("the service ended with exit code %s, want 4:\n%s", code, n.Journal())
	}
	if journal := n.Journal(); !strings.Contains(journal, "Allow kms:GenerateDataKey on ") {
		t.Errorf("the journal does not name the remedy:\n%s", journal)
	}
	if unit := n.Unit("luks-kms-agent.service"); unit["NRestarts"] != "0" || unit["ActiveState"] != "failed" {
		t.Errorf("the service is %s after %s restarts: that mends no permission", unit["ActiveState"], unit["NRestarts"])
	}
	if calls := n.KMS.Calls(); len(calls) > 2 {
		t.Errorf("what is denied was asked again: %v", calls)
	}
	wantUntouched(t, n, blank)
	n.KMS.Inject()

	first := func(i int, op string) *stage {
		s := &stage{t: t, n: n, command: "run", disk: networkDisks[i], number: i + 1, op: op}
		// What everything but waiting for AWS takes on this machine, and some more.
		_, took, _ := s.agent(trouble{what: "plan"}, "plan")
		s.slack = 5*time.Second + 4*took
		return s
	}
	start := time.Now()
	lap := func(what string) {
		t.Logf("%s: %v", what, time.Since(start).Round(time.Second))
		start = time.Now()
	}

	s := first(0, "GenerateDataKey")
	roles, _ := pick(metadata(), "no role", "IMDS down")
	routes, _ := pick(ways(), "connection refused", "a certificate of an unknown CA")
	for _, tr := range slices.Concat(roles, routes) {
		s.meet(tr)
	}
	s.format(trouble{what: ", and IMDS is late", imds: proxy.Down})
	lap("IMDS and the way to KMS")

	s = first(1, "GenerateDataKey")
	alone, chained := pick(passing(), "throttled", "expired token", "dropped", "hangs")
	refusals, _ := pick(final(), "denied", "404 of another server") // badKeys has the others
	for _, tr := range slices.Concat(alone, refusals, badKeys(n), forged(n)) {
		s.meet(tr)
	}
	_, chained = pick(chained, "too slow")
	s.chain(chained, deny())
	s.format(trouble{what: ", but for DescribeKey", kms: []proxy.Fault{{Kind: proxy.Deny, Ops: []string{"DescribeKey"}}, {Kind: proxy.Throttle, Times: 2}}})
	lap("GenerateDataKey")

	s = first(2, "DescribeKey")
	alone, chained = pick(passing(), "throttled", "hangs")
	refusals, _ = pick(final(), "no such key", "404 of another server") // DescribeKey is the one permission that a role may lack
	for _, tr := range slices.Concat(alone, refusals) {
		s.meet(tr)
	}
	_, chained = pick(chained, "too slow")
	s.chain(chained, refusals[0])
	s.format(trouble{})
	lap("DescribeKey")

	s = first(3, "Decrypt")
	proof(t, s)
	lap("the proof of a data key")
	s.command = "unlock"
	withData(t, s)
	lap("a volume with data")

	// Another boot finds all of them.
	n.Sh("for s in /srv/state[1-4]; do for kind in keys volumes; do cp -a $s/$kind/. /var/lib/luks-kms-agent/$kind/; done; done")
	n.Provide(harness.ConfigFile, 0o600, n.Config(named(networkDisks...)))
	n.KMS.Forget()
	n.Reboot()
	n.AwaitVolumes()
	wantCalls(t, n, 0, 4, 0)
	points := []string{"/mnt1", "/mnt2", "/mnt3", "/mnt4"}
	wantMounted(t, n, points...)
	for _, point := range points {
		if line := n.Sh("head -n 1 " + point + "/plaintext-file"); line != marker+point+"\n" {
			t.Errorf("%s: %s", point, line)
		}
	}
	lap("the next boot")
}

// forged are answers to GenerateDataKey that are not KMS's.
func forged(n *harness.Node) []trouble {
	troubles := []trouble{
		{what: "a data key under another key", kms: forge("KeyId", otherARN(n))},
		{what: "a data key of 16 bytes", kms: forge("Plaintext", otherKey(16))},
		{what: "a data key of 64 bytes", kms: forge("Plaintext", otherKey(64))},
	}
	for i := range troubles {
		troubles[i].code, troubles[i].says = 4, []string{"What answers is not KMS"}
	}
	return troubles
}

// proof is about the Decrypt that proves a new data key: a data key that this node could not get back locks no disk.
func proof(t *testing.T, s *stage) {
	t.Helper()
	// Each with a data key of its own.
	forget := "rm -rf " + s.stateDir()
	alone, chained := pick(passing(), "throttled", "hangs")
	_, chained = pick(chained, "too slow")
	end := deny()
	end.keys, end.setup = 1, forget
	s.chain(chained, end)
	refusals, _ := pick(final(), "disabled", "404 of another server")
	troubles := slices.Concat(alone, refusals, []trouble{
		{what: "incorrect key", kms: refuse(400, "IncorrectKeyException"), code: 4, says: []string{"IncorrectKeyException", "KMS does not take the wrapped key"}},
		{what: "Decrypt of another key", kms: forge("KeyId", otherARN(s.n)), code: 4, says: []string{"What answers is not KMS"}},
		{what: "Decrypt gives other 32 bytes", kms: forge("Plaintext", otherKey(32)), code: 4, says: []string{"Decrypt gave another key", "What answers is not KMS"}},
		{what: "Decrypt gives 31 bytes", kms: forge("Plaintext", otherKey(31)), code: 4, says: []string{"it holds no data key"}},
		{what: "the data key is not the wrapped one", code: 4, says: []string{"Decrypt gave another key", "What answers is not KMS"},
			kms: []proxy.Fault{{Kind: proxy.Forge, Ops: []string{"GenerateDataKey"}, Edit: func(answer map[string]any) { answer["Plaintext"] = otherKey(32) }}}},
		{what: "the wrapped key is none", code: 4, says: []string{"InvalidCiphertextException"},
			kms: []proxy.Fault{{Kind: proxy.Forge, Ops: []string{"GenerateDataKey"}, Edit: func(answer map[string]any) { answer["CiphertextBlob"] = otherKey(100) }}}},
	})
	for _, tr := range troubles {
		tr.keys, tr.setup = 1, forget
		s.meet(tr)
	}
	// The key that could not be proven is good enough later: records do not pile up.
	tr := deny()
	tr.keys, tr.setup = 1, forget
	s.meet(tr)
	tr.setup = ""
	s.meet(tr)
	s.format(trouble{})
	wantCalls(t, s.n, 0, 1, 0)
}

// withData is about a volume with data that has to be opened.
func withData(t *testing.T, s *stage) {
	t.Helper()
	state := func(calls ...string) func() {
		return func() {
			for _, op := range calls {
				input := map[string]any{"KeyId": s.n.Key}
				if op == "ScheduleKeyDeletion" {
					input["PendingWindowInDays"] = 7
				}
				s.n.Administer(op, input, nil)
			}
		}
	}
	enable := state("CancelKeyDeletion", "EnableKey")
	for _, tr := range slices.Concat(passing(), ways(), metadata()) {
		s.meet(tr)
	}
	silent, answered := pick(passing(), "hangs", "too slow")
	s.chain(silent, trouble{})
	s.chain(answered, trouble{})
	s.unlock(trouble{what: "slow, but within call_timeout", kms: []proxy.Fault{{Kind: proxy.Slow, Delay: 3 * time.Second}}})
	// Only the CA was wrong with it.
	trust := fmt.Sprintf("mkdir -p /etc/ssl/certs; echo '%s' >/etc/ssl/certs/ca-certificates.crt", s.n.CertificateOfKMS())
	s.unlock(trouble{what: "a CA that the node trusts", endpoint: harness.KMSTLSEndpoint, setup: trust, teardown: "rm /etc/ssl/certs/ca-certificates.crt"})
	for _, tr := range slices.Concat(final(), []trouble{
		{what: "really disabled", begin: state("DisableKey"), end: state("EnableKey"), code: 4, says: []string{"DisabledException", "Enable the key"}},
		{what: "really deleted", begin: state("ScheduleKeyDeletion"), end: enable, code: 4, says: []string{"KMSInvalidStateException", "cancel its deletion"}},
		{what: "incorrect key", kms: refuse(400, "IncorrectKeyException"), code: 4, says: []string{"IncorrectKeyException", "KMS does not take the wrapped key"}},
		{what: "invalid ciphertext", kms: refuse(400, "InvalidCiphertextException"), code: 4, says: []string{"InvalidCiphertextException", "KMS does not take the wrapped key"}},
		{what: "Decrypt of another key", kms: forge("KeyId", otherARN(s.n)), code: 4, says: []string{"What answers is not KMS"}},
		{what: "Decrypt gives 31 bytes", kms: forge("Plaintext", otherKey(31)), code: 4, says: []string{"it holds no data key"}},
		{what: "Decrypt gives 33 bytes", kms: forge("Plaintext", otherKey(33)), code: 4, says: []string{"it holds no data key"}},
		{what: "Decrypt gives another key", kms: forge("Plaintext", otherKey(32)), code: 7, says: []string{"does not open"}},
	}) {
		s.meet(tr)
	}
	s.unlock(trouble{what: "all is well"})

	// The node's clock is wrong: KMS's answer tells the time, and the next signature is by it.
	for _, seconds := range []int{-3600, 7 * 3600} {
		set := func(seconds int) string { return fmt.Sprintf("date -s @$(($(date +%%s) + %d))", seconds) }
		tr := trouble{what: fmt.Sprintf("a clock %d s ahead", seconds), setup: set(seconds), teardown: set(-seconds), kms: []proxy.Fault{{Kind: proxy.Clock}}}
		s.bad(tr)
		r, _, left := s.agent(tr, "unlock")
		calls := s.n.KMS.Calls()
		s.well(tr)
		if r.Code != 0 || !strings.Contains(left, s.point()+"\n") || len(calls) != 2 || calls[0].Code != "InvalidSignatureException" || calls[1].Code != "" ||
			!strings.Contains(r.Stderr, "waiting for AWS") {
			t.Errorf("%s%s%v", r, left, calls)
		}
		s.lock()
	}
	// Session tokens that are forgotten once, and credentials that expired before they were used, are fetched again.
	for _, state := range []proxy.IMDSState{proxy.Forgetful, proxy.Expired} {
		tr := trouble{what: fmt.Sprintf("state %d of IMDS passes", state), begin: func() { s.n.IMDS.SetFor(state, 2) }}
		s.bad(tr)
		r, _, left := s.agent(tr, "unlock")
		s.well(tr)
		if r.Code != 0 || !strings.Contains(left, s.point()+"\n") {
			t.Errorf("%s%s%v%v", r, left, s.n.KMS.Calls(), s.n.IMDS.Requests())
		}
		s.lock()
	}
}

// TestDegradedBoot: KMS is away for ten minutes from power on. The boot does not wait for it, the consumers of the volumes
// do, the agent asks again and again and no more than that, and when KMS is back everything is, without anybody's help.
func TestDegradedBoot(t *testing.T) {
	t.Parallel()                                               // without a place: it mostly waits
	const outage, longest = 10 * time.Minute, 20 * time.Second // longest: wait between two attempts
	n := harness.NewNode(t, assets, "", ssd1, ebs1)
	n.Resume()
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt", "/mnt1")
	files := writeFiles(n, "/mnt", "/mnt1")
	n.PowerOff()

	n.KMS.Inject(down)
	n.KMS.Forget()
	on := time.Now()
	n.Boot() // logins are possible
	n.AwaitActive("multi-user.target", time.Minute)
	waiting := func() {
		t.Helper()
		unit := n.Unit("luks-kms-agent.service")
		if unit["ActiveState"] != "activating" || !strings.Contains(unit["StatusText"], "Waiting for Decrypt, attempt ") || !strings.Contains(unit["StatusText"], "cannot decrypt the wrapped key") {
			t.Errorf("the agent while KMS is away: %v", unit)
		}
		if state := n.Unit("consumer.service")["ActiveState"]; state != "inactive" {
			t.Errorf("the consumer is %s while the volumes are locked", state)
		}
	}
	n.Await("the agent says that it retries", time.Minute, func() bool {
		return strings.Contains(n.Unit("luks-kms-agent.service")["StatusText"], "Waiting for Decrypt")
	})
	waiting()
	wantMounted(t, n)
	t.Logf("logins and multi-user.target after %v", time.Since(on).Round(time.Second))
	for time.Since(on) < outage {
		time.Sleep(min(time.Minute, time.Until(on.Add(outage))+time.Second)) // seldom: the machine is not ours alone
		waiting()
	}
	wantMounted(t, n)
	n.KMS.Inject()
	healed := time.Now()
	n.AwaitActive("consumer.service", longest+time.Minute)
	t.Logf("the consumer started %v after KMS was back", time.Since(healed).Round(time.Second))
	wantWell := func(when string) {
		t.Helper()
		wantMounted(t, n, "/mnt", "/mnt1")
		wantFiles(t, n, files, when, "/mnt", "/mnt1")
		if saw := n.Sh("cat /run/consumer-saw"); !strings.Contains(saw, "/mnt\n") || !strings.Contains(saw, "/mnt1\n") {
			t.Errorf("%s the consumer started before the volumes were mounted: %s", when, saw)
		}
	}
	wantWell("after ten minutes")
	wantJitter(t, n.KMS.Calls(), outage, longest)
	if unit := n.Unit("luks-kms-agent.service"); unit["NRestarts"] != "0" {
		t.Errorf("%s restarts within the default retry_limit", unit["NRestarts"])
	}

	// Longer than a run has patience: systemd starts the next one.
	n.Sh("systemctl stop consumer.service luks-kms-agent.target luks-kms-agent.service && luks-kms-agent lock && rm /run/consumer-saw")
	n.Write(harness.ConfigFile, 0o600, n.Config("retry_limit: 3s\ncall_timeout: 3s\n"))
	n.KMS.Inject(down)
	n.Sh("systemctl start --no-block luks-kms-agent.service") // as multi-user.target does
	n.Await("systemd restarts the agent", 2*time.Minute, func() bool { return n.Unit("luks-kms-agent.service")["NRestarts"] != "0" })
	if journal := n.Sh("journalctl -b -u luks-kms-agent.service"); !strings.Contains(journal, "status=5") {
		t.Errorf("the agent did not end with the retryable exit code:\n%s", journal)
	}
	if state := n.Unit("consumer.service")["ActiveState"]; state != "inactive" {
		t.Errorf("the consumer is %s while the volumes are locked", state)
	}
	n.KMS.Inject()
	n.AwaitActive("consumer.service", 2*time.Minute)
	wantWell("after a restart")
}

// wantJitter looks at the attempts of an outage: from soon after its beginning until its end, neither in step nor a storm.
func wantJitter(t *testing.T, calls []proxy.Call, outage, longest time.Duration) {
	t.Helper()
	var attempts []time.Time
	for _, c := range calls {
		if c.Op == "Decrypt" && c.Status == 0 {
			attempts = append(attempts, c.Time)
		}
	}
	// Waits are uniform between 0 and the longest once they have grown: the mean is half of the longest.
	if n, mean := len(attempts), int(outage/(longest/2)); n < mean/3 || n > 2*mean {
		t.Fatalf("%d attempts in %v", n, outage)
	}
	const burst = 10
	var gaps []time.Duration
	for i := 1; i < len(attempts); i++ {
		gaps = append(gaps, attempts[i].Sub(attempts[i-1]))
		if i >= 2*burst && attempts[i].Sub(attempts[i-burst]) < longest/2 {
			t.Errorf("%d attempts within %v", burst+1, attempts[i].Sub(attempts[i-burst]))
		}
	}
	slices.Sort(gaps)
	t.Logf("%d attempts; gaps: shortest %v, median %v, longest %v", len(attempts), gaps[0], gaps[len(gaps)/2], gaps[len(gaps)-1])
	if gap := gaps[len(gaps)-1]; gap > longest+10*time.Second {
		t.Errorf("the longest gap is %v", gap)
	}
	if low, high := gaps[len(gaps)/4], gaps[3*len(gaps)/4]; high-low < longest/8 {
		t.Errorf("half of the gaps are between %v and %v: that is no jitter", low, high)
	}
}
