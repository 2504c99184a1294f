// Command floor does the least that anybody has to do, as something to measure the agent against: no check, no record, no wait for
// udev, no systemd.
//
//	floor DEV=DIR…                            open and mount with the passphrase on standard input
//	floor -kms RECORD -endpoint URL DEV=DIR…  the same, with the key of a key record, which KMS decrypts
//	floor -format DEV=BYTES…                  write and flush what a first boot has to, BYTES being what mkfs writes
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/anatol/devmapper.go"
	luksgo "github.com/anatol/luks.go"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"golang.org/x/sys/unix"
)

func main() {
	record := flag.String("kms", "", "key record whose wrapped key KMS is asked to decrypt")
	endpoint := flag.String("endpoint", "", "URL of KMS")
	format := flag.Bool("format", false, "write instead of open")
	flag.Parse()
	if err := run(*record, *endpoint, *format, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func run(record, endpoint string, format bool, args []string) error {
	if format {
		return all(args, write)
	}
	var passphrase []byte
	var err error
	if record == "" {
		passphrase, err = io.ReadAll(os.Stdin)
	} else {
		passphrase, err = decrypt(context.Background(), record, endpoint, imds.Options{})
	}
	if err != nil {
		return err
	}
	return all(args, func(device, point string) error { return open(passphrase, device, point) })
}

// decrypt returns the passphrase that belongs to a key record, by one call of KMS with the instance's credentials.
func decrypt(ctx context.Context, record, endpoint string, metadata imds.Options) ([]byte, error) {
	b, err := os.ReadFile(record)
	if err != nil {
		return nil, err
	}
	var r struct {
		KeyARN     string `json:"key_arn"`
		WrappedKey []byte `json:"wrapped_key"`
		Region     string `json:"region"`
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", record, err)
	}
	// The SDK's own gives up after 250 ms, in which an emulated machine may not have connected, and then goes on without a token.
	metadata.HTTPClient, metadata.EnableFallback = &http.Client{}, aws.FalseTernary
	role := ec2rolecreds.New(func(o *ec2rolecreds.Options) { o.Client = imds.New(metadata) })
	client := kms.New(kms.Options{Region: r.Region, BaseEndpoint: &endpoint, Credentials: aws.NewCredentialsCache(role)})
	out, err := client.Decrypt(ctx, &kms.DecryptInput{KeyId: &r.KeyARN, CiphertextBlob: r.WrappedKey})
	if err != nil {
		return nil, fmt.Errorf("cannot decrypt the key of %s: %w", record, err)
	}
	return []byte(base64.StdEncoding.EncodeToString(out.Plaintext)), nil
}

// open reads the key slot, derives, merges, checks the digest, makes the mapping and mounts.
func open(passphrase []byte, device, point string) error {
	d, err := luksgo.Open(device)
	if err != nil {
		return err
	}
	defer d.Close()
	v, err := d.UnsealVolume(0, passphrase)
	if err != nil {
		return err
	}
	name := "floor" + strings.ReplaceAll(point, "/", "-")
	if err := v.SetupMapper(name); err != nil {
		return err
	}
	info, err := devmapper.InfoByName(name)
	if err != nil {
		return err
	}
	return unix.Mount(fmt.Sprintf("/dev/dm-%d", unix.Minor(info.DevNo)), point, "ext4", 0, "")
}

// write writes and flushes as many bytes as a first boot has to: a header with its key slot, and what mkfs writes.
func write(device, amount string) error {
	const header = 2*16<<10 + 256000 // both copies, and the slot
	n, err := strconv.Atoi(amount)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, header))
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		_, err = f.WriteAt(make([]byte, n), 16<<20)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// all does the same for all arguments LEFT=RIGHT at once.
func all(args []string, do func(left, right string) error) error {
	errs := make([]error, len(args))
	var wg sync.WaitGroup
	for i, arg := range args {
		wg.Go(func() {
			left, right, ok := strings.Cut(arg, "=")
			if !ok {
				errs[i] = fmt.Errorf("%q is not LEFT=RIGHT", arg)
				return
			}
			if err := do(left, right); err != nil {
				errs[i] = fmt.Errorf("%s: %w", left, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
