package mooring_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"mooring.dev/mooring"
	"mooring.dev/mooring/mooringv1"
)

func answered(context.Context) (*mooringv1.GetServerInfoResponse, error) {
	return &mooringv1.GetServerInfoResponse{Tenant: "tenants/acme"}, nil
}

// -- connection ---------------------------------------------------------------------------------------------------

func TestPlainTextIsForLoopbackOnly(t *testing.T) {
	for target, allowed := range map[string]bool{
		"127.0.0.1:50051":             true,
		"[::1]:50051":                 true,
		"localhost:50051":             true,
		"dns:///localhost:50051":      true,
		"unix:///run/mooring.sock":    true,
		"10.0.0.1:50051":              false,
		"mooring.example:443":         false,
		"dns:///127.0.0.1.example:80": false,
		"dns://127.0.0.1/example:80":  false,
		"127.0.0.1@example:80":        false,
	} {
		client, err := mooring.New(target, mooring.WithInsecure())
		if (err == nil) != allowed {
			t.Errorf("%s: %v", target, err)
		}
		if err == nil {
			client.Close()
		}
	}
}

func TestOptionsThatCannotBeFollowedAreErrorsOfNew(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, option := range map[string]mooring.Option{
		"no file":        mooring.WithRootCAFile(empty + ".not"),
		"no certificate": mooring.WithRootCAFile(empty),
		"no pair":        mooring.WithClientCertificate(empty, empty),
		"empty key":      mooring.WithAPIKey(""),
		"key and line":   mooring.WithAPIKey("moor_1\n"),
	} {
		if client, err := mooring.New("localhost:1", option); err == nil {
			client.Close()
			t.Errorf("%s: no error", name)
		}
	}
}

func TestTheEnvironmentIsAnOption(t *testing.T) {
	var seen []string
	target := listen(t, &scripted{info: func(ctx context.Context) (*mooringv1.GetServerInfoResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		seen = append(seen, md.Get("authorization")...)
		return answered(ctx)
	}}, nil)
	call := func() error {
		client, err := mooring.New(target, mooring.WithEnvironment())
		if err != nil {
			return err
		}
		defer client.Close()
		_, err = client.ServerInfo(t.Context())
		return err
	}
	for _, name := range []string{"API_KEY", "TOKEN_FILE", "CLIENT_CERTIFICATE", "CLIENT_KEY"} {
		t.Setenv("MOORING_"+name, "")
	}
	t.Setenv("MOORING_ROOT_CERTIFICATES", certs(t).ca)
	t.Setenv("MOORING_API_KEY", "moor_key")
	if err := call(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("jwt\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("MOORING_TOKEN_FILE", file)
	if err := call(); err == nil {
		t.Error("a key and a token are one too many")
	}
	t.Setenv("MOORING_API_KEY", "")
	if err := call(); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(seen, []string{"Bearer moor_key", "Bearer jwt"}) {
		t.Error(seen)
	}
	t.Setenv("MOORING_CLIENT_KEY", certs(t).client.key)
	if err := call(); err == nil {
		t.Error("half a client certificate was taken")
	}
}

// telling stands for OpenTelemetry's stats handler: it too puts the trace of a call into its metadata.
type telling struct{ traceparent string }

func (t telling) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "traceparent", t.traceparent)
}
func (telling) HandleRPC(context.Context, stats.RPCStats)                         {}
func (telling) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (telling) HandleConn(context.Context, stats.ConnStats)                       {}

func TestAStatsHandlerIsADialOption(t *testing.T) {
	var seen []string
	s := &scripted{info: func(ctx context.Context) (*mooringv1.GetServerInfoResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		seen = md.Get("traceparent")
		return answered(ctx)
	}}
	wanted := "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	client := serve(t, s, mooring.WithDialOptions(grpc.WithStatsHandler(telling{wanted})))
	if _, err := client.ServerInfo(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(seen, []string{wanted}) {
		t.Error(seen)
	}
}

func TestServersOfUnknownAuthoritiesAreNotTrusted(t *testing.T) {
	target := listen(t, &scripted{info: answered}, nil)
	client, err := mooring.New(target) // the system's roots
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.ServerInfo(t.Context()); !strings.Contains(err.Error(), "certificate") {
		t.Fatal(err)
	}
}

func TestEveryCallCarriesTheCredential(t *testing.T) {
	var seen []string
	s := &scripted{info: func(ctx context.Context) (*mooringv1.GetServerInfoResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		seen = append(seen, md.Get("authorization")...)
		return answered(ctx)
	}}
	tokens := []string{"first", "second"}
	source := func(context.Context) (string, error) {
		if len(tokens) == 0 {
			return "", errors.New("the issuer is away")
		}
		token := tokens[0]
		tokens = tokens[1:]
		return token, nil
	}
	for _, client := range []*mooring.Client{
		serve(t, s, mooring.WithAPIKey("moor_key")), serve(t, s, mooring.WithTokenSource(source)),
	} {
		for range 2 {
			if _, err := client.ServerInfo(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if len(tokens) == 0 {
			_, err := client.ServerInfo(t.Context())
			if status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "issuer is away") {
				t.Fatal(err)
			}
		}
	}
	if want := []string{"Bearer moor_key", "Bearer moor_key", "Bearer first", "Bearer second"}; !slices.Equal(seen, want) {
		t.Fatal(seen)
	}
}

func TestClientCertificate(t *testing.T) {
	target := listen(t, &scripted{info: answered}, func(config *tls.Config) {
		pem, err := os.ReadFile(certs(t).ca)
		if err != nil {
			t.Fatal(err)
		}
		config.ClientCAs = x509.NewCertPool()
		config.ClientCAs.AppendCertsFromPEM(pem)
		config.ClientAuth = tls.RequireAndVerifyClientCert
	})
	call := func(options ...mooring.Option) error {
		client, err := mooring.New(target, append(options, mooring.WithRootCAFile(certs(t).ca))...)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		_, err = client.ServerInfo(t.Context())
		return err
	}
	if err := call(); err == nil {
		t.Error("a server that wants a certificate took a client without one")
	}
	if err := call(mooring.WithClientCertificate(certs(t).client.cert, certs(t).client.key)); err != nil {
		t.Error(err)
	}
}

// -- errors -------------------------------------------------------------------------------------------------------

func TestErrorsAreTyped(t *testing.T) {
	client := serve(t, &scripted{train: func(context.Context, *mooringv1.TrainRequest) (*mooringv1.TrainResponse, error) {
		return nil, failure(
			codes.ResourceExhausted, "The queue is full. Repeat later.",
			info("QUEUE_FULL", map[string]string{"remedy": "Repeat later.", "limit": "64", "request_id": "r1"}),
			&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
				{Field: "config.steps", Description: "too many"},
			}},
			retryInfo(2500*time.Millisecond),
		)
	}})
	_, err := client.Train(t.Context(), &mooringv1.TrainRequest{Subject: "rex"})
	var failed *mooring.Error
	if !errors.As(err, &failed) {
		t.Fatalf("%T", err)
	}
	got := *failed
	want := mooring.Error{
		Code: codes.ResourceExhausted, Reason: "QUEUE_FULL", Message: "The queue is full.", Remedy: "Repeat later.",
		Fields:   []mooring.FieldViolation{{Field: "config.steps", Description: "too many"}},
		Metadata: map[string]string{"limit": "64"}, RetryAfter: 2500 * time.Millisecond, RequestID: "r1",
	}
	if got.Error() != "mooring: QUEUE_FULL: The queue is full. Repeat later." {
		t.Error(got.Error())
	}
	if !mooring.Has(err, mooringv1.ErrorReason_ERROR_REASON_QUEUE_FULL) ||
		mooring.Has(err, mooringv1.ErrorReason_ERROR_REASON_DRAINING) {
		t.Error("Has")
	}
	if status.Code(err) != codes.ResourceExhausted {
		t.Error("gRPC's own helpers do not know it")
	}
	if got.Code != want.Code || got.Reason != want.Reason || got.Message != want.Message || got.Remedy != want.Remedy ||
		got.RetryAfter != want.RetryAfter || got.RequestID != want.RequestID ||
		!reflect.DeepEqual(got.Fields, want.Fields) || !reflect.DeepEqual(got.Metadata, want.Metadata) {
		t.Errorf("%+v", got)
	}
}

func TestContextErrorsAreThemselves(t *testing.T) {
	client := serve(t, &scripted{info: func(ctx context.Context) (*mooringv1.GetServerInfoResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}, mooring.WithTimeout(50*time.Millisecond))
	_, err := client.ServerInfo(t.Context())
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the client's own deadline: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = client.ServerInfo(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// -- retries ------------------------------------------------------------------------------------------------------

func TestOnlyUnavailableIsRepeatedWithTheSameRequestID(t *testing.T) {
	var ids []string
	s := &scripted{}
	s.train = func(_ context.Context, r *mooringv1.TrainRequest) (*mooringv1.TrainResponse, error) {
		ids = append(ids, r.GetRequestId())
		if s.count() < 2 {
			return nil, failure(codes.Unavailable, "Starting.", info("DRAINING", nil))
		}
		return &mooringv1.TrainResponse{Job: &mooringv1.Job{Name: r.GetSubject()}}, nil
	}
	request := &mooringv1.TrainRequest{Subject: "rex"}
	job, err := serve(t, s).Train(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	if job.GetName() != "tenants/-/subjects/rex" || request.GetSubject() != "rex" || request.GetRequestId() != "" {
		t.Error("the id is completed in a copy")
	}
	if len(ids) != 3 || ids[0] == "" || ids[0] != ids[1] || ids[1] != ids[2] {
		t.Error(ids)
	}

	for _, code := range []codes.Code{codes.ResourceExhausted, codes.Internal, codes.Aborted, codes.DeadlineExceeded} {
		s := &scripted{}
		s.train = func(context.Context, *mooringv1.TrainRequest) (*mooringv1.TrainResponse, error) {
			s.count()
			return nil, failure(code, "No.")
		}
		if _, err := serve(t, s).Train(t.Context(), request); status.Code(err) != code {
			t.Errorf("%s: %v", code, err)
		}
		if calls := len(s.times()); calls != 1 {
			t.Errorf("%s: %d calls", code, calls)
		}
	}
}

func TestPushBackIsHonoured(t *testing.T) {
	s := &scripted{}
	s.info = func(ctx context.Context) (*mooringv1.GetServerInfoResponse, error) {
		if s.count() == 0 {
			grpc.SetTrailer(ctx, pushback(1500)) // longer than any first pause of the client's own
			return nil, failure(codes.Unavailable, "Draining.")
		}
		return answered(ctx)
	}
	if _, err := serve(t, s).ServerInfo(t.Context()); err != nil {
		t.Fatal(err)
	}
	if calls := s.times(); len(calls) != 2 || calls[1].Sub(calls[0]) < 1500*time.Millisecond {
		t.Error(calls)
	}

	never := &scripted{}
	never.info = func(ctx context.Context) (*mooringv1.GetServerInfoResponse, error) {
		never.count()
		grpc.SetTrailer(ctx, pushback(-1))
		return nil, failure(codes.Unavailable, "Gone for good.")
	}
	if _, err := serve(t, never).ServerInfo(t.Context()); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	if calls := never.times(); len(calls) != 1 {
		t.Error(len(calls))
	}
}
