// Traced draws a prompt and sends the spans of its calls to a collector; the server's spans are in the same trace where
// the server is told of that collector too.
//
//	export MOORING_API_KEY=moor_… OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317
//	go run -C examples/traced . -server mooring.example:443 "a photo of a red car on the beach"
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"

	"mooring.dev/mooring"
	"mooring.dev/mooring/mooringv1"
)

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) (err error) {
	server := flag.String("server", "localhost:50051", "address of the server")
	out := flag.String("out", ".", "folder to write to")
	flag.Parse()

	// Where spans go is what OpenTelemetry's own variables say.
	exporter, err := otlptracegrpc.New(ctx)
	if err != nil {
		return err
	}
	provider := trace.NewTracerProvider(trace.WithBatcher(exporter))
	defer func() {
		// what was recorded is sent even where the context has ended
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		err = errors.Join(err, provider.Shutdown(ending))
	}()
	otel.SetTracerProvider(provider)
	otel.SetTextMapPropagator(propagation.TraceContext{})

	client, err := mooring.New(*server, mooring.WithEnvironment(),
		mooring.WithDialOptions(grpc.WithStatsHandler(otelgrpc.NewClientHandler())))
	if err != nil {
		return err
	}
	defer client.Close()

	ctx, span := otel.Tracer("examples/traced").Start(ctx, "draw")
	defer span.End()
	images, err := client.Images(ctx, &mooringv1.GenerateRequest{Prompt: flag.Arg(0)})
	if err != nil {
		return err
	}
	path := *out + "/drawn.png"
	fmt.Println(path, span.SpanContext().TraceID())
	return images[0].WriteFile(path)
}
