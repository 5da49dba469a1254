package mooring

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// Option changes how [New] makes a client.
type Option func(*settings) error

type settings struct {
	tls      tls.Config
	insecure bool
	token    func(context.Context) (string, error)
	timeout  time.Duration
	patience time.Duration
	dial     []grpc.DialOption
}

// WithAPIKey sends an API key with every call.
func WithAPIKey(key string) Option {
	return func(s *settings) error {
		if key == "" || strings.ContainsAny(key, " \r\n") {
			return errors.New("WithAPIKey: the key is empty or has blanks")
		}
		s.token = func(context.Context) (string, error) { return key, nil }
		return nil
	}
}

// WithTokenSource asks source for the token (a JWT) of every call. The source keeps and renews it; it is called
// by several goroutines at a time. Its error fails the call with UNAUTHENTICATED.
func WithTokenSource(source func(context.Context) (string, error)) Option {
	return func(s *settings) error {
		s.token = source
		return nil
	}
}

// WithRootCAs trusts servers whose certificate leads to one of these, instead of the system's.
func WithRootCAs(roots *x509.CertPool) Option {
	return func(s *settings) error {
		s.tls.RootCAs = roots
		return nil
	}
}

// WithRootCAFile trusts servers whose certificate leads to one of those in a PEM file, instead of the system's.
func WithRootCAFile(path string) Option {
	return func(s *settings) error {
		pem, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("WithRootCAFile: %w", err)
		}
		s.tls.RootCAs = x509.NewCertPool()
		if !s.tls.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("WithRootCAFile: %s holds no PEM certificate", path)
		}
		return nil
	}
}

// WithClientCertificate shows a certificate to the server, from PEM files. They are read anew at every connection,
// so that a renewed certificate is taken up.
func WithClientCertificate(certFile, keyFile string) Option {
	return func(s *settings) error {
		if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
			return fmt.Errorf("WithClientCertificate: %w", err)
		}
		s.tls.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(certFile, keyFile)
			return &pair, err
		}
		return nil
	}
}

// WithEnvironment takes credential and trust from the environment; an empty variable counts as unset.
//
// MOORING_API_KEY is the key. MOORING_TOKEN_FILE is a file that holds the token; it is read again at every call, so
// that it may be replaced. MOORING_ROOT_CERTIFICATES is a PEM file of the authorities to trust.
// MOORING_CLIENT_CERTIFICATE and MOORING_CLIENT_KEY are PEM files of the client's chain and key.
func WithEnvironment() Option {
	return func(s *settings) error {
		var options []Option
		key, tokenFile := os.Getenv("MOORING_API_KEY"), os.Getenv("MOORING_TOKEN_FILE")
		switch {
		case key != "" && tokenFile != "":
			return errors.New("MOORING_API_KEY and MOORING_TOKEN_FILE exclude each other")
		case key != "":
			options = append(options, WithAPIKey(key))
		case tokenFile != "":
			options = append(options, WithTokenSource(func(context.Context) (string, error) {
				token, err := os.ReadFile(tokenFile)
				return strings.TrimSpace(string(token)), err
			}))
		}
		if path := os.Getenv("MOORING_ROOT_CERTIFICATES"); path != "" {
			options = append(options, WithRootCAFile(path))
		}
		cert, private := os.Getenv("MOORING_CLIENT_CERTIFICATE"), os.Getenv("MOORING_CLIENT_KEY")
		if (cert == "") != (private == "") {
			return errors.New("MOORING_CLIENT_CERTIFICATE and MOORING_CLIENT_KEY belong together")
		}
		if cert != "" {
			options = append(options, WithClientCertificate(cert, private))
		}
		for _, option := range options {
			if err := option(s); err != nil {
				return err
			}
		}
		return nil
	}
}

// WithServerName expects this name in the server's certificate instead of the target's host.
func WithServerName(name string) Option {
	return func(s *settings) error {
		s.tls.ServerName = name
		return nil
	}
}

// WithInsecure speaks plain text, for a server on this machine: [New] refuses it for anything but loopback.
func WithInsecure() Option {
	return func(s *settings) error {
		s.insecure = true
		return nil
	}
}

// WithTimeout sets how long a short call may take whose context has no deadline; 0 is without limit.
// Default: 30 s.
func WithTimeout(timeout time.Duration) Option {
	return func(s *settings) error {
		s.timeout = timeout
		return nil
	}
}

// WithPatience sets how long [Client.Watch] waits for a lost server, which may be loading its base model.
// Default: 2 min.
func WithPatience(patience time.Duration) Option {
	return func(s *settings) error {
		s.patience = patience
		return nil
	}
}

// WithDialOptions adds options of gRPC, such as interceptors or OpenTelemetry's stats handler.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(s *settings) error {
		s.dial = append(s.dial, options...)
		return nil
	}
}

func (s *settings) security(target string) ([]grpc.DialOption, error) {
	transport := credentials.NewTLS(&s.tls)
	if s.insecure {
		if !loopback(target) {
			return nil, fmt.Errorf("WithInsecure: %q is not a loopback address; use TLS", target)
		}
		transport = insecure.NewCredentials()
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(transport)}
	if s.token != nil {
		options = append(options, grpc.WithPerRPCCredentials(bearer{s.token, !s.insecure}))
	}
	return options, nil
}

// loopback tells whether a target can be reached from this machine only.
func loopback(target string) bool {
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return true
	}
	for _, scheme := range []string{"dns:///", "dns:", "passthrough:///", "passthrough:"} {
		if rest, found := strings.CutPrefix(target, scheme); found {
			target = rest
			break
		}
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = strings.Trim(target, "[]")
	}
	if host == "localhost" {
		return true
	}
	address, err := netip.ParseAddr(host)
	return err == nil && address.IsLoopback()
}

// bearer sends a token as "authorization: Bearer".
type bearer struct {
	source func(context.Context) (string, error)
	secure bool
}

func (b bearer) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	token, err := b.source(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unauthenticated, "The token source failed: %v", err)
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

func (b bearer) RequireTransportSecurity() bool { return b.secure }
