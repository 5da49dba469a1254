// Batch draws every line of standard input over one connection and writes line N to N.png.
//
//	export MOORING_API_KEY=moor_…
//	go run ./examples/batch -server mooring.example:443 -adapter rex -out drawn <prompts.txt
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strconv"

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

func run(ctx context.Context) error {
	server := flag.String("server", "localhost:50051", "address of the server")
	adapter := flag.String("adapter", "", "adapter to draw with; default: the base alone")
	out := flag.String("out", ".", "folder to write to")
	flag.Parse()

	client, err := mooring.New(*server, mooring.WithEnvironment())
	if err != nil {
		return err
	}
	defer client.Close()

	// Read as fast as the server takes them: the file may be larger than memory.
	lines := bufio.NewScanner(os.Stdin)
	requests := func(yield func(string, *mooringv1.GenerateRequest) bool) {
		for n := 1; lines.Scan(); n++ {
			request := &mooringv1.GenerateRequest{Prompt: lines.Text(), Adapter: *adapter}
			if !yield(strconv.Itoa(n), request) {
				return
			}
		}
	}
	failed := 0
	for event, err := range client.GenerateBatch(ctx, requests) {
		switch {
		case err != nil:
			return err
		case event.Err != nil:
			failed++
			log.Printf("line %s: %v", event.ID, event.Err)
		case event.Image != nil:
			path := *out + "/" + event.ID + ".png"
			if err := event.Image.WriteFile(path); err != nil {
				return err
			}
			fmt.Println(path)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	if failed > 0 {
		return fmt.Errorf("%d lines failed", failed)
	}
	return nil
}
