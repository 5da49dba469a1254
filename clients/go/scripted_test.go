package mooring_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"mooring.dev/mooring"
	"mooring.dev/mooring/mooringv1"
)

// scripted is a real gRPC server over TLS whose answers a test decides. What it does not set is UNIMPLEMENTED.
type scripted struct {
	mooringv1.UnimplementedPersonalizationServiceServer
	mooringv1.UnimplementedSubjectServiceServer
	mooringv1.UnimplementedJobServiceServer

	info     func(context.Context) (*mooringv1.GetServerInfoResponse, error)
	train    func(context.Context, *mooringv1.TrainRequest) (*mooringv1.TrainResponse, error)
	generate func(*mooringv1.GenerateRequest, grpc.ServerStreamingServer[mooringv1.GenerateResponse]) error
	batch    func(grpc.BidiStreamingServer[mooringv1.GenerateBatchRequest, mooringv1.GenerateBatchResponse]) error
	upload   func(grpc.ClientStreamingServer[mooringv1.UploadPhotosRequest, mooringv1.UploadPhotosResponse]) error
	watch    func(*mooringv1.WatchJobRequest, grpc.ServerStreamingServer[mooringv1.WatchJobResponse]) error
	jobs     func(*mooringv1.ListJobsRequest) (*mooringv1.ListJobsResponse, error)

	mu    sync.Mutex
	calls []time.Time
}

func (s *scripted) GetServerInfo(
	ctx context.Context, _ *mooringv1.GetServerInfoRequest,
) (*mooringv1.GetServerInfoResponse, error) {
	return s.info(ctx)
}

func (s *scripted) Train(ctx context.Context, r *mooringv1.TrainRequest) (*mooringv1.TrainResponse, error) {
	return s.train(ctx, r)
}

func (s *scripted) Generate(
	r *mooringv1.GenerateRequest, stream grpc.ServerStreamingServer[mooringv1.GenerateResponse],
) error {
	return s.generate(r, stream)
}

func (s *scripted) GenerateBatch(
	stream grpc.BidiStreamingServer[mooringv1.GenerateBatchRequest, mooringv1.GenerateBatchResponse],
) error {
	return s.batch(stream)
}

func (s *scripted) UploadPhotos(
	stream grpc.ClientStreamingServer[mooringv1.UploadPhotosRequest, mooringv1.UploadPhotosResponse],
) error {
	return s.upload(stream)
}

func (s *scripted) WatchJob(
	r *mooringv1.WatchJobRequest, stream grpc.ServerStreamingServer[mooringv1.WatchJobResponse],
) error {
	return s.watch(r, stream)
}

func (s *scripted) ListJobs(_ context.Context, r *mooringv1.ListJobsRequest) (*mooringv1.ListJobsResponse, error) {
	return s.jobs(r)
}

// count notes a call and returns how many there were before it.
func (s *scripted) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, time.Now())
	return len(s.calls) - 1
}

func (s *scripted) times() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]time.Time(nil), s.calls...)
}

// serve starts a scripted server and returns a client of it. changes are made to its TLS configuration.
func serve(t *testing.T, s *scripted, options ...mooring.Option) *mooring.Client {
	t.Helper()
	client, err := mooring.New(listen(t, s, nil), append([]mooring.Option{mooring.WithRootCAFile(certs(t).ca)}, options...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func listen(t *testing.T, s *scripted, change func(*tls.Config)) string {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(certs(t).server.cert, certs(t).server.key)
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	if change != nil {
		change(config)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	mooringv1.RegisterPersonalizationServiceServer(server, s)
	mooringv1.RegisterSubjectServiceServer(server, s)
	mooringv1.RegisterJobServiceServer(server, s)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

// failure is an error as the server makes it. A push-back below 0 says not to repeat the call.
func failure(code codes.Code, message string, details ...protoadapt.MessageV1) error {
	s, err := status.New(code, message).WithDetails(details...)
	if err != nil {
		panic(err)
	}
	return s.Err()
}

func info(reason string, metadata map[string]string) *errdetails.ErrorInfo {
	return &errdetails.ErrorInfo{Domain: "mooring", Reason: reason, Metadata: metadata}
}

func retryInfo(delay time.Duration) *errdetails.RetryInfo {
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(delay)}
}

func pushback(delay int) metadata.MD {
	return metadata.Pairs("grpc-retry-pushback-ms", strconv.Itoa(delay))
}

// authority holds the PEM files of a certificate authority and of what it signed.
type authority struct {
	ca             string
	server, client certFiles
}

type certFiles struct{ cert, key string }

var makeCerts = sync.OnceValues(func() (authority, error) {
	folder, err := os.MkdirTemp("", "mooring-go-certs")
	if err != nil {
		return authority{}, err
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	made := authority{ca: filepath.Join(folder, "ca.pem")}
	if _, err = sign(root, root, rootKey, rootKey, made.ca); err != nil {
		return authority{}, err
	}
	for serial, files := range []*certFiles{&made.server, &made.client} {
		name := []string{"server", "client"}[serial]
		*files = certFiles{filepath.Join(folder, name+".pem"), filepath.Join(folder, name+".key")}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return authority{}, err
		}
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(int64(serial + 2)), Subject: pkix.Name{CommonName: name},
			NotBefore: root.NotBefore, NotAfter: root.NotAfter,
			DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if _, err = sign(leaf, root, key, rootKey, files.cert); err != nil {
			return authority{}, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return authority{}, err
		}
		if err = writePEM(files.key, "PRIVATE KEY", der); err != nil {
			return authority{}, err
		}
	}
	return made, nil
})

func certs(t *testing.T) authority {
	t.Helper()
	made, err := makeCerts()
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func sign(leaf, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey, path string) ([]byte, error) {
	der, err := x509.CreateCertificate(rand.Reader, leaf, parent, &key.PublicKey, parentKey)
	if err != nil {
		return nil, err
	}
	return der, writePEM(path, "CERTIFICATE", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
