package harness

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// What the servers say about the node.
const (
	Account    = "111122223333"
	Region     = "us-east-1"
	InstanceID = "i-0123456789abcdef0"
)

// KMS is also at this address with TLS, and with a certificate that no node trusts by itself.
const (
	KMSTLSAddress  = "169.254.169.251:443"
	KMSTLSEndpoint = "https://169.254.169.251"
)

// servers are one node's own KMS and instance metadata. All of them listen on the loopback address only, on ports that
// the kernel chose.
type servers struct {
	kms      *proxy.KMS
	imds     *proxy.IMDS
	upstream string // local-kms without the proxy: for what an administrator does
	kmsAddr  string // of the proxy, as host:port
	imdsAddr string
	tlsAddr  string // of the proxy with TLS
	ca       []byte // what a node has to trust to use that one, in PEM
	greeted  atomic.Int64
	stops    []func()
}

func startServers(a *Assets, dir string) (*servers, error) {
	s := &servers{}
	if err := s.start(a, dir); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

func (s *servers) stop() {
	for _, stop := range s.stops {
		stop()
	}
}

func (s *servers) start(a *Assets, dir string) error {
	address, err := s.startKMS(a, dir)
	if err != nil {
		return fmt.Errorf("cannot start local-kms: %w", err)
	}
	s.upstream = "http://" + address + "/"
	s.kms = proxy.NewKMS(s.upstream, Region)
	if s.kmsAddr, err = s.serve(s.kms); err != nil {
		return err
	}
	if err = s.serveTLS(s.kms); err != nil {
		return fmt.Errorf("cannot serve KMS with TLS: %w", err)
	}
	return s.serveIMDS(a, dir, InstanceID)
}

func (s *servers) serve(handler http.Handler) (address string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }()
	s.stops = append(s.stops, func() { _ = server.Close() })
	return listener.Addr().String(), nil
}

// serveTLS serves with a certificate that signs itself, and counts who connects, also who goes away for the certificate.
func (s *servers) serveTLS(handler http.Handler) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	host, _, err := net.SplitHostPort(KMSTLSAddress)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.ParseIP(host)}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.tlsAddr, s.ca = listener.Addr().String(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: time.Minute,
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: key}}},
		ErrorLog:  log.New(io.Discard, "", 0), // handshakes fail because the story wants them to
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				s.greeted.Add(1)
			}
		},
	}
	go func() { _ = server.ServeTLS(listener, "", "") }()
	s.stops = append(s.stops, func() { _ = server.Close() })
	return nil
}

// CertificateOfKMS returns, in PEM, what a node has to trust to use KMSTLSEndpoint.
func (n *Node) CertificateOfKMS() string { return string(n.servers.ca) }

// TLSConnections returns how often KMSTLSEndpoint was connected to.
func (n *Node) TLSConnections() int { return int(n.servers.greeted.Load()) }

func (s *servers) startKMS(a *Assets, dir string) (address string, err error) {
	cmd := exec.Command(a.KMS, "-data", filepath.Join(dir, "kms"), "-account", Account, "-region", Region)
	leash, err := cmd.StdinPipe() // it ends when this closes
	if err != nil {
		return "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	s.stops = append(s.stops, func() { _ = leash.Close(); _ = cmd.Wait() })
	address, err = bufio.NewReader(out).ReadString('\n')
	return strings.TrimSpace(address), err
}

// serveIMDS lets a node that starts from now on be the instance of that id.
func (s *servers) serveIMDS(a *Assets, dir, instance string) error {
	address, err := s.startIMDS(a, dir, instance)
	if err != nil {
		return fmt.Errorf("cannot start the metadata mock: %w", err)
	}
	s.imds = proxy.NewIMDS(&url.URL{Scheme: "http", Host: address})
	s.imdsAddr, err = s.serve(s.imds)
	return err
}

// startIMDS starts the mock with credentials that have not expired; its own have.
func (s *servers) startIMDS(a *Assets, dir, instance string) (address string, err error) {
	const layout = "2006-01-02T15:04:05Z"
	config, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"values": map[string]any{
			"instance-id":                   instance,
			"iam-security-credentials-role": "node",
			"iam-security-credentials": map[string]string{
				"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIAEXAMPLE", "SecretAccessKey": "example", "Token": "example",
				"LastUpdated": time.Now().UTC().Format(layout), "Expiration": time.Now().Add(6 * time.Hour).UTC().Format(layout),
			},
		}, "paths": map[string]any{"iam-security-credentials": "/latest/meta-data/iam/security-credentials/node"}},
		"dynamic": map[string]any{"values": map[string]any{"instance-identity-document": map[string]any{
			"accountId": Account, "instanceId": instance, "region": Region, "availabilityZone": Region + "a", "instanceType": "m5d.xlarge",
			"imageId": "ami-0123456789abcdef0", "architecture": "x86_64", "version": "2017-09-30",
		}}},
	})
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "imds-"+instance+".json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return "", err
	}
	for range 5 {
		if address, err = s.tryIMDS(a, file); err == nil {
			return address, nil
		}
	}
	return "", err
}

// tryIMDS starts the mock on a port that was free a moment ago.
func (s *servers) tryIMDS(a *Assets, config string) (address string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	address = listener.Addr().String()
	if err := listener.Close(); err != nil {
		return "", err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", err
	}
	cmd := exec.Command(a.Guest, "leash", a.IMDS, "-c", config, "-n", "127.0.0.1", "-p", port, "-I")
	leash, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		return "", err
	}
	stop := func() { _ = leash.Close(); _ = cmd.Wait() }
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		response, err := http.Get("http://" + address + "/latest/meta-data/")
		if err != nil {
			continue
		}
		_ = response.Body.Close()
		if response.StatusCode == http.StatusUnauthorized { // IMDSv2 only, as it was told
			s.stops = append(s.stops, stop)
			return address, nil
		}
	}
	stop()
	return "", fmt.Errorf("it does not answer on %s: %s", address, lastLines(said.Bytes(), 10))
}

// administer calls local-kms as a key administrator would, past the proxy and its record.
func (s *servers) administer(op string, in, out any) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.upstream, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/x-amz-json-1.1")
	request.Header.Set("X-Amz-Target", "TrentService."+op)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return fmt.Errorf("cannot call %s: %w", op, err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("cannot call %s: %w", op, err)
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("cannot call %s: status %d: %s", op, response.StatusCode, answer)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer, out)
}
