package mooring

import (
	"context"
	"crypto/rand"
	"fmt"
	"iter"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"

	"mooring.dev/mooring/mooringv1"
)

// maxMessageBytes is gRPC's default limit, kept on both sides: whatever is larger travels in chunks.
const maxMessageBytes = 4 << 20

// retryBufferBytes keeps an upload for a repeat; gRPC's default of 256 KiB would give it up.
const retryBufferBytes = 16 << 20

// serviceConfig lets gRPC repeat what failed with UNAVAILABLE, in every method: creating calls carry a request id,
// and a stream is repeated until its first message only. The server's push-back (grpc-retry-pushback-ms) goes
// before the pauses named here.
const serviceConfig = `{
	"methodConfig": [{
		"name": [{}],
		"retryPolicy": {
			"maxAttempts": 5,
			"initialBackoff": "0.2s",
			"maxBackoff": "5s",
			"backoffMultiplier": 2,
			"retryableStatusCodes": ["UNAVAILABLE"]
		}
	}],
	"retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1}
}`

// Client is a connection to a Mooring server. It is safe for use by several goroutines; one is enough for a
// program.
type Client struct {
	conn     *grpc.ClientConn
	timeout  time.Duration
	patience time.Duration

	personalization mooringv1.PersonalizationServiceClient
	subjects        mooringv1.SubjectServiceClient
	adapters        mooringv1.AdapterServiceClient
	jobs            mooringv1.JobServiceClient
}

// New returns a client of the server at target, "host:port" or a gRPC name such as "dns:///host:port".
//
// It does not wait for the connection, which is made with the first call and made again whenever it is lost. An
// option that cannot be followed (an unreadable certificate, plain text beyond loopback) is an error here.
func New(target string, options ...Option) (*Client, error) {
	settings := settings{timeout: 30 * time.Second, patience: 2 * time.Minute}
	for _, option := range options {
		if err := option(&settings); err != nil {
			return nil, fmt.Errorf("mooring: %w", err)
		}
	}
	security, err := settings.security(target)
	if err != nil {
		return nil, fmt.Errorf("mooring: %w", err)
	}
	dial := []grpc.DialOption{
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessageBytes),
			grpc.MaxCallSendMsgSize(maxMessageBytes),
			grpc.MaxRetryRPCBufferSize(retryBufferBytes),
		),
		// An open call without data is probed every 30 s; the server allows a probe in 10 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		// A client that outlives a restart of the server finds the new one within seconds, not minutes.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second,
			},
			MinConnectTimeout: 10 * time.Second,
		}),
		grpc.WithUserAgent("mooring-go"),
	}
	conn, err := grpc.NewClient(target, append(append(dial, security...), settings.dial...)...)
	if err != nil {
		return nil, fmt.Errorf("mooring: %w", err)
	}
	return &Client{
		conn:            conn,
		timeout:         settings.timeout,
		patience:        settings.patience,
		personalization: mooringv1.NewPersonalizationServiceClient(conn),
		subjects:        mooringv1.NewSubjectServiceClient(conn),
		adapters:        mooringv1.NewAdapterServiceClient(conn),
		jobs:            mooringv1.NewJobServiceClient(conn),
	}, nil
}

// Close closes the connection; calls under way end with [codes.Canceled].
//
// [codes.Canceled]: https://pkg.go.dev/google.golang.org/grpc/codes
func (c *Client) Close() error { return c.conn.Close() }

// Conn returns the connection, for stubs of package mooringv1 and other services of the server such as health.
// Their errors are gRPC's; [AsError] makes typed ones of them.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// ServerInfo tells what the server runs: base model, limits, methods, presets, defaults, and who the caller is.
func (c *Client) ServerInfo(ctx context.Context) (*mooringv1.GetServerInfoResponse, error) {
	return unary(ctx, c, c.personalization.GetServerInfo, &mooringv1.GetServerInfoRequest{})
}

// unary makes a short call: with the client's deadline where the context has none, and with a typed error.
func unary[Request, Response any](
	ctx context.Context,
	c *Client,
	call func(context.Context, Request, ...grpc.CallOption) (Response, error),
	request Request,
) (Response, error) {
	if _, limited := ctx.Deadline(); !limited && c.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	response, err := call(ctx, request)
	return response, AsError(err)
}

// pages iterates over the items of all pages, which are fetched as they are needed.
func pages[Item any](fetch func(token string) ([]Item, string, error)) iter.Seq2[Item, error] {
	return func(yield func(Item, error) bool) {
		for token := ""; ; {
			items, next, err := fetch(token)
			if err != nil {
				var none Item
				yield(none, err)
				return
			}
			for _, item := range items {
				if !yield(item, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			token = next
		}
	}
}

// resourceName completes an id to a name; "" stays "".
func resourceName(collection, id string) string {
	if id == "" || strings.HasPrefix(id, "tenants/") {
		return id
	}
	return "tenants/-/" + collection + "/" + id
}

// orNewID returns the request id, or a new one (a random UUID) where there is none.
func orNewID(id string) string {
	if id != "" {
		return id
	}
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
