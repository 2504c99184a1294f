// Command kms runs local-kms on the loopback address only.
//
// local-kms by itself binds every interface. It registers its handler with net/http's default mux and then listens, so
// this command gives it a port that cannot be listened on, keeps it from exiting on that, and serves the mux itself.
//
//	kms -data DIR -account ID -region REGION
//
// The first line on standard output is the address it listens on, as host:port.
package main

import (
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"github.com/nsmithuk/local-kms/src"
	"github.com/nsmithuk/local-kms/src/config"
	"github.com/sirupsen/logrus"
)

func main() {
	flag.StringVar(&config.DatabasePath, "data", "", "directory of the key database")
	flag.StringVar(&config.AWSAccountId, "account", "111122223333", "account id of the keys")
	flag.StringVar(&config.AWSRegion, "region", "us-east-1", "region of the keys")
	flag.Parse()
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "kms:", err)
		os.Exit(1)
	}
}

func serve() error {
	// The server ends with whoever started it, however that ended.
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("cannot listen: %w", err)
	}
	registered := make(chan struct{})
	logrus.StandardLogger().ExitFunc = func(int) {
		close(registered)
		select {}
	}
	logrus.SetOutput(io.Discard)
	go src.Run("none", "")
	<-registered
	fmt.Println(listener.Addr())
	return http.Serve(listener, nil)
}
