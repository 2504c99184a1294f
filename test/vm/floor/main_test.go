package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// The floor asks KMS once, as the instance's role, and gets the passphrase that the agent would.
func TestDecrypt(t *testing.T) {
	metadata, kms := kmstest.NewIMDS(t), kmstest.NewKMS(t)
	kms.Trust(metadata)
	key := []byte("a data key of some 32 bytes: ten")
	text, err := json.Marshal(map[string]any{
		"version": 1, "key_arn": kms.ARN(), "wrapped_key": kms.Wrap(kms.ARN(), key, nil), "region": kmstest.Region,
	})
	if err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(t.TempDir(), "record.json")
	if err := os.WriteFile(record, text, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := decrypt(t.Context(), record, kms.URL(), imds.Options{Endpoint: metadata.URL()})
	if want := base64.StdEncoding.EncodeToString(key); err != nil || string(got) != want {
		t.Errorf("got %q (%v), want %q", got, err, want)
	}
	if calls := kms.Calls(); len(calls) != 1 || calls[0].Op != "Decrypt" {
		t.Errorf("got the calls %v, want one Decrypt", calls)
	}
}

func TestAllDoesAll(t *testing.T) {
	var done atomic.Int32
	broken := errors.New("broken")
	err := all([]string{"a=1", "b=2", "c=3", "d"}, func(left, right string) error {
		done.Add(1)
		if left == "b" {
			return broken
		}
		return nil
	})
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "b: broken") || !strings.Contains(err.Error(), `"d" is not LEFT=RIGHT`) {
		t.Errorf("got the error %v, want those of b and d", err)
	}
	if done.Load() != 3 {
		t.Errorf("%d of 3 were done", done.Load())
	}
}
