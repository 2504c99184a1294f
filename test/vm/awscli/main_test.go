package main

import (
	"errors"
	"io"
	"strings"
	"testing"
)

// TestStrict: a document with a mistake in a command must not pass here and fail at night.
func TestStrict(t *testing.T) {
	good := "kms decrypt --key-id k --ciphertext-blob fileb://f --query Plaintext --output text"
	for what, line := range map[string]string{
		"no command":                 "",
		"another service":            "s3 ls",
		"unknown operation":          "kms decode --key-id k",
		"unknown option":             "kms enable-key --key-id k --force yes",
		"part of an option":          "kms enable-key --key k",
		"option of another":          "kms enable-key --key-id k --query KeyId --output text",
		"no value":                   "kms enable-key --key-id",
		"option for a value":         "kms decrypt --key-id --ciphertext-blob fileb://f --query Plaintext --output text",
		"missing option":             "kms decrypt --ciphertext-blob fileb://f --query Plaintext --output text",
		"twice":                      "kms enable-key --key-id k --key-id k",
		"another query":              strings.Replace(good, "Plaintext", "KeyId", 1),
		"JSON":                       strings.Replace(good, "text", "json", 1),
		"without output":             strings.Replace(good, " --output text", "", 1),
		"a word that is no option":   good + " more",
		"the file's name for a blob": strings.Replace(good, "fileb://", "", 1),
		"a file as text":             strings.Replace(good, "fileb://", "file://", 1),
	} {
		env := func(string) string { return "us-east-1" }
		err := run(t.Context(), strings.Fields(line), env, io.Discard)
		var exit *exitError
		if !errors.As(err, &exit) {
			t.Errorf("%s: %v", what, err)
		}
	}
	var exit *exitError
	if err := run(t.Context(), strings.Fields(good), func(string) string { return "" }, io.Discard); !errors.As(err, &exit) || exit.code != exitConfiguration {
		t.Errorf("without region and credentials: %v", err)
	}
}
