// Generate draws a prompt and writes the images to files.
//
//	export MOORING_API_KEY=moor_…
//	go run ./examples/generate -server mooring.example:443 -adapter rex "a photo of a <rex> dog on the beach"
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"

	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring"
	"mooring.dev/mooring/mooringv1"
)

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		var failed *mooring.Error
		if errors.As(err, &failed) {
			for _, field := range failed.Fields {
				log.Printf("%s: %s", field.Field, field.Description)
			}
		}
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	server := flag.String("server", "localhost:50051", "address of the server")
	adapter := flag.String("adapter", "", "adapter to draw with; default: the base alone")
	count := flag.Int("count", 1, "images to draw")
	seed := flag.Uint64("seed", 0, "seed of the first image")
	out := flag.String("out", ".", "folder to write to")
	flag.Parse()

	client, err := mooring.New(*server, mooring.WithEnvironment())
	if err != nil {
		return err
	}
	defer client.Close()

	request := &mooringv1.GenerateRequest{
		Prompt:  flag.Arg(0),
		Adapter: *adapter,
		Count:   proto.Int32(int32(*count)),
		Seed:    seed,
	}
	for event, err := range client.Generate(ctx, request) {
		switch {
		case err != nil:
			return err
		case event.Queued != nil:
			log.Printf("waiting behind %d requests", event.Queued.GetPosition())
		case event.Progress != nil:
			log.Printf("step %d of %d", event.Progress.GetStep(), event.Progress.GetSteps())
		case event.Image != nil:
			path := fmt.Sprintf("%s/%d.png", *out, event.Image.Seed)
			if err := event.Image.WriteFile(path); err != nil {
				return err
			}
			fmt.Println(path)
		case event.Done != nil:
			log.Printf("drawn in %s with %q", event.Done.GetTotalTime().AsDuration(), event.Done.GetAdapter())
		}
	}
	return nil
}
