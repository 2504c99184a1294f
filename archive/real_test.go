//go:build s3real

package archive

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"flag"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// Servers that are not ours: `make test-s3-real` builds them, and gives their paths; `make test` has the first one.
var (
	versitygw = flag.String("versitygw", "", "the program versitygw")
	minio     = flag.String("minio", "", "the program minio")
)

// root are the credentials that both servers are started with.
var root = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
	return aws.Credentials{AccessKeyID: "root-of-the-test", SecretAccessKey: "made-up-for-the-test"}, nil
})

// serve starts a server on the loopback address, and waits until it answers. {ADDRESS} and {DIR} in its arguments stand for its own.
func serve(t *testing.T, program string, env []string, args ...string) (url, dir string) {
	t.Helper()
	if program == "" {
		t.Fatal("the program was not given: run this by `make test-s3-real`")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	dir = t.TempDir()
	l.Close()
	for i, a := range args {
		switch a {
		case "{ADDRESS}":
			args[i] = address
		case "{DIR}":
			args[i] = dir
		}
	}
	if err := os.Mkdir(filepath.Join(dir, bucket), 0o700); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Env = append([]string{"HOME=" + dir, "PATH=" + os.Getenv("PATH")}, env...)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%s", program, log.String())
		}
	})
	url = "http://" + address
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if answer, err := http.Get(url); err == nil {
			answer.Body.Close()
			return url, dir
		}
	}
	t.Fatalf("%s does not answer", program)
	return "", ""
}

// realClient is a client of such a server; KMS is ours where the node asks it.
func realClient(t *testing.T, url string, mode Mode, key string, kms *kmstest.KMS) *Client {
	t.Helper()
	return build(Options{Bucket: bucket, Region: s3test.Region, Mode: mode, KeyARN: key, Endpoint: url, KMSEndpoint: kms.URL(), Credentials: root}, kmstest.Region)
}

// roundTrip puts, lists, gets, and does not overwrite.
func roundTrip(t *testing.T, c *Client) {
	t.Helper()
	for _, size := range []int{1, 3 << 20, 20 << 20} {
		name := "a/b-" + string(rune('a'+size%26)) + ".tar"
		data := content(t, size)
		o, err := c.Put(t.Context(), name, data, map[string]string{"identity": "vol-1"})
		if err != nil {
			t.Fatal(err)
		}
		back, got, err := c.Get(t.Context(), name)
		if err != nil || !bytes.Equal(back, data) || got.Metadata["identity"] != "vol-1" || c.Check(o) != nil || c.Check(got) != nil {
			t.Errorf("%d bytes: %v, %+v", size, err, got)
		}
		if _, err := c.Put(t.Context(), name, data, nil); err != nil {
			t.Errorf("the same again: %v", err)
		}
		_, err = c.Put(t.Context(), name, content(t, size+1), nil)
		wantReason(t, "something else under that name", err, ReasonExists)
	}
	all, err := c.List(t.Context(), "a/")
	if err != nil || len(all) != 3 {
		t.Errorf("%+v, %v", all, err)
	}
	_, _, err = c.Get(t.Context(), "a/none")
	wantReason(t, "nothing", err, ReasonNotFound)
}

// TestVersityGateway: what the node encrypts is at home on a server that encrypts nothing, and that one's silence about SSE-KMS is seen.
func TestVersityGateway(t *testing.T) {
	url, dir := serve(t, *versitygw, []string{"ROOT_ACCESS_KEY=root-of-the-test", "ROOT_SECRET_KEY=made-up-for-the-test"},
		"--region", s3test.Region, "--port", "{ADDRESS}", "posix", "{DIR}")
	kms := kmstest.NewKMS(t)
	kms.AllowContext()
	cse := realClient(t, url, CSE, kms.ARN(), kms)
	roundTrip(t, cse)
	plain := []byte("what nobody but the node and KMS may read")
	if _, err := cse.Put(t.Context(), "secret", plain, nil); err != nil {
		t.Fatal(err)
	}
	if stored, err := os.ReadFile(filepath.Join(dir, bucket, "secret")); err != nil || len(stored) <= len(plain) || bytes.Contains(stored, plain[:8]) {
		t.Errorf("on the server's disk: %q, %v", stored, err)
	}

	c := realClient(t, url, SSE, kms.ARN(), kms)
	_, err := c.Put(t.Context(), "sse", content(t, 1000), nil)
	wantReason(t, "SSE-KMS", err, ReasonEncryption)
	t.Log(err)
	_, _, err = c.Get(t.Context(), "sse")
	wantReason(t, "what lies there now", err, ReasonEncryption)
}

// TestMinIO: SSE-KMS by code that is not ours.
func TestMinIO(t *testing.T) {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails
	url, _ := serve(t, *minio, []string{"MINIO_ROOT_USER=root-of-the-test", "MINIO_ROOT_PASSWORD=made-up-for-the-test", "MINIO_REGION=" + s3test.Region,
		"MINIO_KMS_SECRET_KEY=my-key:" + base64.StdEncoding.EncodeToString(secret)}, "server", "--quiet", "--address", "{ADDRESS}", "{DIR}")
	kms := kmstest.NewKMS(t)
	kms.AllowContext()
	const key = "arn:aws:kms:my-key" // as this server names its keys
	sse := realClient(t, url, SSE, key, kms)
	makeBucket(t, sse.s3)
	roundTrip(t, sse)
	out, err := sse.s3.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: aws.String(bucket), Key: aws.String("a/b-b.tar")})
	if err != nil || out.ServerSideEncryption != "aws:kms" || aws.ToString(out.SSEKMSKeyId) != key {
		t.Errorf("the properties: %+v, %v", out, err)
	}
	t.Logf("MinIO says: %s under %s", out.ServerSideEncryption, aws.ToString(out.SSEKMSKeyId))

	// Under a key that it does not have, and one that it was not asked for.
	_, err = realClient(t, url, SSE, "arn:aws:kms:another-key", kms).Put(t.Context(), "x", content(t, 1000), nil)
	if e := (*Error)(nil); !errors.As(err, &e) || e.Reason == ReasonUnavailable {
		t.Errorf("another key: %v", err)
	}
	_, _, err = realClient(t, url, SSE, "arn:aws:kms:another-key", kms).Get(t.Context(), "a/b-b.tar")
	wantReason(t, "another key", err, ReasonEncryption)

	cse := realClient(t, url, CSE, kms.ARN(), kms)
	cse.options.Bucket = "cse"
	if _, err := cse.s3.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: aws.String("cse")}); err != nil {
		t.Fatal(err)
	}
	roundTrip(t, cse)
}

// makeBucket is for a server that may take a folder for a bucket or not.
func makeBucket(t *testing.T, c *s3.Client) {
	t.Helper()
	if _, err := c.HeadBucket(t.Context(), &s3.HeadBucketInput{Bucket: aws.String(bucket)}); err == nil {
		return
	}
	if _, err := c.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: aws.String(bucket)}); err != nil {
		t.Fatal(err)
	}
}
