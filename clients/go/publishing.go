package mooring

import (
	"context"
	"iter"

	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring/mooringv1"
)

// PublishAdapter lets an alias ("live" where request.Alias is empty) point to a version, if the tenant's gate passes
// it; from then on "rex@live" stands for that version. A refusal is an [*Error] with GATE_REFUSED or
// GATE_NEEDS_EVALUATION and a field violation for each failing figure.
func (c *Client) PublishAdapter(
	ctx context.Context, request *mooringv1.PublishAdapterRequest,
) (*mooringv1.PublishAdapterResponse, error) {
	request = proto.CloneOf(request)
	request.Name = resourceName("adapters", request.GetName())
	request.RequestId = orNewID(request.GetRequestId())
	return unary(ctx, c, c.adapters.PublishAdapter, request)
}

// RollBackAdapter lets an alias of an adapter ("live" where request.Alias is empty) point again to the version before;
// called again, it goes further back.
func (c *Client) RollBackAdapter(
	ctx context.Context, request *mooringv1.RollBackAdapterRequest,
) (*mooringv1.AdapterAlias, error) {
	request = proto.CloneOf(request)
	request.Name = resourceName("adapters", request.GetName())
	request.RequestId = orNewID(request.GetRequestId())
	response, err := unary(ctx, c, c.adapters.RollBackAdapter, request)
	return response.GetAlias(), err
}

// DeleteAlias deletes an alias ("rex@live"); the version that it points to stays, and so does the history.
func (c *Client) DeleteAlias(ctx context.Context, alias string) error {
	request := &mooringv1.DeleteAliasRequest{Name: resourceName("adapters", alias)}
	_, err := unary(ctx, c, c.adapters.DeleteAlias, request)
	return err
}

// Aliases iterates over the aliases of an adapter ("rex"), or of all where it is empty, by name.
func (c *Client) Aliases(ctx context.Context, adapter string) iter.Seq2[*mooringv1.AdapterAlias, error] {
	return pages(func(token string) ([]*mooringv1.AdapterAlias, string, error) {
		request := &mooringv1.ListAliasesRequest{Adapter: resourceName("adapters", adapter), PageToken: token}
		page, err := unary(ctx, c, c.adapters.ListAliases, request)
		return page.GetAliases(), page.GetNextPageToken(), err
	})
}

// AliasMoves iterates over what happened to an adapter's aliases ("rex"), or to one of them ("rex@live"), newest
// first.
func (c *Client) AliasMoves(ctx context.Context, name string) iter.Seq2[*mooringv1.AliasMove, error] {
	return pages(func(token string) ([]*mooringv1.AliasMove, string, error) {
		request := &mooringv1.ListAliasMovesRequest{Name: resourceName("adapters", name), PageToken: token}
		page, err := unary(ctx, c, c.adapters.ListAliasMoves, request)
		return page.GetMoves(), page.GetNextPageToken(), err
	})
}

// GateDecisions iterates over what the gate decided about an adapter ("rex"), a version ("rex@2"), or all where it
// is empty, newest first.
func (c *Client) GateDecisions(ctx context.Context, adapter string) iter.Seq2[*mooringv1.GateDecision, error] {
	return pages(func(token string) ([]*mooringv1.GateDecision, string, error) {
		request := &mooringv1.ListGateDecisionsRequest{Adapter: resourceName("adapters", adapter), PageToken: token}
		page, err := unary(ctx, c, c.adapters.ListGateDecisions, request)
		return page.GetDecisions(), page.GetNextPageToken(), err
	})
}

// GatePolicy returns what the tenant's gate asks for.
func (c *Client) GatePolicy(ctx context.Context) (*mooringv1.GatePolicy, error) {
	response, err := unary(ctx, c, c.adapters.GetGatePolicy, &mooringv1.GetGatePolicyRequest{})
	return response.GetPolicy(), err
}

// UpdateGatePolicy changes what the tenant's gate asks for, from now on; what request does not set stays.
func (c *Client) UpdateGatePolicy(
	ctx context.Context, request *mooringv1.UpdateGatePolicyRequest,
) (*mooringv1.GatePolicy, error) {
	response, err := unary(ctx, c, c.adapters.UpdateGatePolicy, request)
	return response.GetPolicy(), err
}
